"""A stack of blocks: the one place that decides scanning over layers and rematerialisation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.biases import RelativeBias, alibi_slopes
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.attention import Attend, TokenInfo, attend_within
from t5x_like.models.block import Block, BlockConfig, BlockState, Encoded
from t5x_like.models.latent_attention import LatentAttentionConfig
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import (
    GraphDef,
    Initializer,
    Initializers,
    Module,
    ModuleDict,
    Params,
    merge,
    parameter,
    split,
    stack_modules,
)
from t5x_like.models.positions import AlibiConfig, RelativeBiasConfig
from t5x_like.models.routers import RouterStats
from t5x_like.sharding import pipeline

NAMED_TENSORS = ("query", "key", "value", "attention", "mlp", "gate")
"""What a block names with `checkpoint_name`, in the order it is computed; the kernels name `attention` themselves."""

Vectors = Float[Array, "batch length embed"]
Bias = Float[Array, "heads buckets"] | None
LayerResults = dict[str, list[Any]]
"""State and router statistics of layers, by place in the cycle or number of the layer."""
States = dict[str, dict[str, BlockState]]
"""By `scanned` or `unrolled`, then by place in the cycle or number of the layer."""


@configurable
class PipelineConfig:
    """How layers are pipelined where the mesh has stages (MeshConfig.stage above 1).

    Attributes:
      num_microbatches: parts of the batch that travel from stage to stage. A stage waits for (stages - 1) /
        (num_microbatches * repeats + stages - 1) of the time.
      repeats: turns of a microbatch through all stages, each of which then has several pieces of the layers; above 1
        it needs at least as many microbatches as stages.
    """

    num_microbatches: int = 8
    repeats: int = 1

    def __post_init__(self):
        for name in ("num_microbatches", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"PipelineConfig.{name} is {getattr(self, name)}: it must be at least 1.")


@configurable
class StackConfig:
    """Blocks one after the other, and a norm behind the last.

    Attributes:
      num_layers: number of blocks in all.
      block: the block; several are a cycle that repeats, e.g. five with a window and one without (Gemma 3).
      first: blocks before the cycle begins (the dense layers of DeepSeek-V3).
      position_bias: what all layers add to attention by the distance of tokens; None: nothing.
      final_norm: normalisation of the result; None: none.
      scan_layers: runs the cycles as one compiled loop over stacked parameters, so that compile time does not grow with
        depth; False unrolls them.
      remat: what the backward pass finds of the forward pass: `none` recomputes nothing; `full` keeps each block's
        input only; `dots` keeps the results of the projections; `names` keeps `remat_names`; `offload` keeps
        `remat_names` in host memory. The rest is recomputed.
      remat_names: tensors kept by `names` and `offload`, among query, key, value, attention, mlp, gate.
      pipeline: how the scanned cycles are pipelined where the mesh has stages.
    """

    num_layers: int
    block: BlockConfig | tuple[BlockConfig, ...]
    first: tuple[BlockConfig, ...] = ()
    position_bias: RelativeBiasConfig | AlibiConfig | None = None
    final_norm: NormConfig | None = NormConfig()
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "names", "offload"] = "none"
    remat_names: tuple[str, ...] = ()
    pipeline: PipelineConfig = PipelineConfig()

    def __post_init__(self):
        if self.num_layers < 1:
            raise UserError(f"StackConfig.num_layers is {self.num_layers}: it must be at least 1.")
        if not self.cycle:
            raise UserError("StackConfig.block is empty: give a block, or the blocks of a cycle.")
        if self.num_layers < len(self.first) + len(self.cycle):
            raise UserError(
                f"StackConfig.num_layers is {self.num_layers}: it is less than the {len(self.first)} blocks of `first` "
                f"and one cycle of {len(self.cycle)}."
            )
        self._check_position_bias()
        unknown = sorted(set(self.remat_names) - set(NAMED_TENSORS))
        if unknown:
            raise UserError(
                f"StackConfig.remat_names has {', '.join(unknown)}: choose among {', '.join(NAMED_TENSORS)}."
            )
        if bool(self.remat_names) != (self.remat in ("names", "offload")):
            raise UserError(
                f"StackConfig.remat is {self.remat!r} and remat_names is {self.remat_names}: "
                "`names` and `offload` need remat_names, the other policies take none."
            )

    def _check_position_bias(self):
        if self.position_bias is None:
            return
        kind, attentions = type(self.position_bias).__name__, [block.attention for block in self.distinct]
        if any(isinstance(attention, LatentAttentionConfig) or attention.rotary for attention in attentions):
            raise UserError(
                f"StackConfig.position_bias is {kind} and its attention has rotary positions: a model has one or the "
                "other. Set AttentionConfig.rotary = None or StackConfig.position_bias = None."
            )
        if len(heads := {attention.num_heads for attention in attentions}) > 1:
            raise UserError(
                f"StackConfig.position_bias is {kind}, which all layers share, but their AttentionConfig.num_heads "
                f"differ ({', '.join(map(str, sorted(heads)))}): make them equal."
            )

    @property
    def cycle(self) -> tuple[BlockConfig, ...]:
        """The blocks that repeat."""
        return self.block if isinstance(self.block, tuple) else (self.block,)

    @property
    def distinct(self) -> tuple[BlockConfig, ...]:
        """Every block that is configured, once."""
        return self.first + self.cycle

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The block of each layer."""
        cycle, repeated = self.cycle, self.num_layers - len(self.first)
        return self.first + tuple(cycle[i % len(cycle)] for i in range(repeated))

    @property
    def num_cycles(self) -> int:
        """How many whole cycles are scanned."""
        return (self.num_layers - len(self.first)) // len(self.cycle) if self.scan_layers else 0

    @property
    def unrolled(self) -> tuple[int, ...]:
        """The layers that are not scanned: those before the cycles, and those of a cycle that is not whole."""
        begin = len(self.first)
        end = begin + self.num_cycles * len(self.cycle)
        return (*range(begin), *range(end, self.num_layers))

    @property
    def places(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """The numbers of the layers at each place of the parameters: `scanned` or `unrolled`, and the key there."""
        begin, size = len(self.first), len(self.cycle)
        end = begin + self.num_cycles * size
        scanned = {("scanned", str(i)): tuple(range(begin + i, end, size)) for i in range(size) if end > begin}
        return scanned | {("unrolled", str(i)): (i,) for i in self.unrolled}

    def locate(self, layer: int) -> tuple[tuple[str, str], int | None]:
        """Where the parameters of a layer are: two keys, and the index in arrays stacked over cycles, if they are."""
        if layer in self.unrolled:
            return ("unrolled", str(layer)), None
        number, place = divmod(layer - len(self.first), len(self.cycle))
        return ("scanned", str(place)), number

    def checkpointed(self, function: Callable, *, in_scan: bool) -> Callable:
        """`function` with this remat policy."""
        policies = jax.checkpoint_policies
        match self.remat:
            case "none":
                return function
            case "full":
                policy = None
            case "dots":
                policy = policies.dots_with_no_batch_dims_saveable
            case "names":
                policy = policies.save_only_these_names(*self.remat_names)
            case "offload":
                policy = policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=list(self.remat_names),
                    offload_src="device",
                    offload_dst="pinned_host",
                )
        # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


class StackOutput(NamedTuple):
    """What a stack returns.

    Attributes:
      x: the vectors behind the last layer, normalised.
      states: of the layers; None for each without decoding.
      stats: of the layers' routers; None for each that has none.
    """

    x: Float[Array, "batch length embed"]
    states: States
    stats: dict[str, dict[str, RouterStats | None]]


class Stack(Module):
    """The layers.

    `scanned` holds the blocks of the cycle by their place in it, each stacked over the cycles; `unrolled` the other
    layers by number. States and statistics of the layers lie in dicts of the same form.
    """

    def __init__(
        self,
        config: StackConfig,
        d_model: int,
        *,
        mask: MaskSpec,
        inits: Initializers,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, config.num_layers + 1)
        build = lambda block, key: Block(block, d_model, mask=mask, inits=inits, dtype=dtype, key=key)
        blocks, begin, size = config.blocks, len(config.first), len(config.cycle)
        layers = lambda place: keys[begin + place : begin + config.num_cycles * size : size]
        scanned = {str(i): stack_modules(partial(build, config.cycle[i]), layers(i)) for i in range(size)}
        unrolled = {str(i): build(blocks[i], keys[i]) for i in config.unrolled}
        self.scanned = ModuleDict(scanned) if config.num_cycles else None
        self.unrolled = ModuleDict(unrolled) if unrolled else None
        self.position_bias = PositionBias(config, bidirectional=not mask.causal, init=inits.kernel, key=keys[-1])
        self.final_norm = None if config.final_norm is None else Norm(config.final_norm, d_model)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        tokens: TokenInfo,
        attend: Attend = attend_within,
        encoded: Encoded | None = None,
        states: States | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> StackOutput:
        """Runs all layers; what belongs to scanned layers is stacked over the cycles."""
        first = len(self.config.first)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)
        run = Run(partial(self.position_bias.added_to, attend), self.position_bias.parameters(), Rows(tokens, encoded))
        given = {"scanned": {}, "unrolled": {}} if states is None else states
        x, begun = self.run_unrolled(x, [i for i in self.config.unrolled if i < first], run, given["unrolled"], keys)
        x, cycles = self.run_cycles(x, run, given["scanned"], keys)
        x, ended = self.run_unrolled(x, [i for i in self.config.unrolled if i >= first], run, given["unrolled"], keys)
        x = x if self.final_norm is None else self.final_norm(x)
        states, stats = (
            {kind: {i: both[which] for i, both in layers.items()} for kind, layers in new.items()}
            for new in ({"scanned": cycles, "unrolled": begun | ended},)
            for which in (0, 1)
        )
        return StackOutput(x, states, stats)

    def run_unrolled(
        self, x: Vectors, layers: Sequence[int], run: "Run", states: dict[str, BlockState], keys: PRNGKeyArray | None
    ) -> tuple[Vectors, LayerResults]:
        results = {}
        for i in layers:
            graphdef, params = split(self.unrolled[str(i)])
            layer = self.config.checkpointed(partial(run.layer, graphdef), in_scan=False)
            key = None if keys is None else keys[i]
            x, *results[str(i)] = layer(x, params, states.get(str(i)), key, run.rows, run.bias)
        return x, results

    def run_cycles(
        self, x: Vectors, run: "Run", states: dict[str, BlockState], keys: PRNGKeyArray | None
    ) -> tuple[Vectors, LayerResults]:
        """Scans the cycles, or, where the mesh has stages, pipelines them."""
        config, size = self.config, len(self.config.cycle)
        if not config.num_cycles:
            return x, {}
        graphdefs, params = zip(*(split(self.scanned[str(i)]) for i in range(size)), strict=True)
        blocks = [config.checkpointed(partial(run.layer, graphdef), in_scan=True) for graphdef in graphdefs]
        if keys is not None:
            begin = len(config.first)
            keys = keys[begin : begin + config.num_cycles * size].reshape(-1, size)

        def cycle(x: Vectors, layers: tuple[Any, ...], rows: Rows, bias: Bias) -> tuple[Vectors, LayerResults]:
            params, states, keys = layers
            results = {}
            for i, block in enumerate(blocks):
                key = None if keys is None else keys[i]
                x, *results[str(i)] = block(x, params[i], states.get(str(i)), key, rows, bias)
            return x, results

        if pipeline.num_stages() > 1 and not states:
            return self.pipeline_cycles(x, cycle, (params, {}, keys), run)
        return lax.scan(lambda x, layers: cycle(x, layers, run.rows, run.bias), x, (params, states, keys))

    def pipeline_cycles(
        self, x: Vectors, cycle: Callable, layers: tuple[Any, ...], run: "Run"
    ) -> tuple[Vectors, LayerResults]:
        """The cycles in stages; those that fill up the last stages are skipped."""
        schedule, count = self.config.pipeline, self.config.num_cycles
        params, _, keys = layers
        padding = pipeline.padding(count, pipeline.num_stages(), schedule.repeats)
        fill = lambda a: jnp.concatenate([a, jnp.broadcast_to(a[:1], (padding, *a.shape[1:]))]) if padding else a
        stacked = jax.tree.map(fill, (params, None if keys is None else jax.random.key_data(keys)))
        is_cycle = jnp.arange(count + padding) < count
        number = jnp.arange(x.shape[0], dtype=jnp.int32) % schedule.num_microbatches

        def run_some(layers, x, rows, bias):
            rows, number = rows

            def step(x, layer):
                (params, key_data), is_cycle = layer
                keys = None
                if key_data is not None:
                    # Every microbatch draws its own.
                    fold = jax.vmap(jax.random.fold_in, (0, None))
                    keys = fold(jax.random.wrap_key_data(key_data), number[0])
                work = lambda x: cycle(x, (params, {}, keys), rows, bias)
                if not padding:
                    return work(x)
                nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(work, x)[1])
                return lax.cond(is_cycle, work, lambda x: (x, nothing), x)

            return lax.scan(step, x, layers)

        x, results = pipeline.pipelined(
            run_some,
            (stacked, is_cycle),
            x,
            (run.rows, number),
            run.bias,
            num_microbatches=schedule.num_microbatches,
            repeats=schedule.repeats,
        )
        return x, jax.tree.map(lambda a: a[:count], results)


class Rows(NamedTuple):
    """What belongs to the rows of a batch, beside the vectors.

    Attributes:
      tokens: whose vectors they are.
      encoded: what a decoder attends to.
    """

    tokens: TokenInfo
    encoded: Encoded | None


class Run(NamedTuple):
    """One run of a stack's layers.

    Attributes:
      attend_with: from the parameters of the position bias to the core of attention.
      bias: these parameters.
      rows: of the batch.
    """

    attend_with: Callable[[Bias], Attend]
    bias: Bias
    rows: Rows

    def layer(
        self,
        graphdef: GraphDef,
        x: Vectors,
        params: Params,
        state: BlockState | None,
        key: PRNGKeyArray | None,
        rows: Rows,
        bias: Bias,
    ) -> tuple[Vectors, BlockState | None, RouterStats | None]:
        block, attend = merge(graphdef, params), self.attend_with(bias)
        return block(x, tokens=rows.tokens, attend=attend, encoded=rows.encoded, state=state, dropout_key=key)


class PositionBias(Module):
    """The bias that a stack's layers share, by distance of query and key: T5's table, or ALiBi's slopes."""

    def __init__(self, config: StackConfig, *, bidirectional: bool, init: Initializer, key: PRNGKeyArray):
        self.config = config.position_bias
        self.num_heads = config.blocks[0].attention.num_heads
        self.bidirectional = bidirectional
        is_table = isinstance(self.config, RelativeBiasConfig)
        shape = (self.num_heads, self.config.num_buckets if is_table else 0)
        self.table = parameter(init(key, shape, *shape[::-1]), ("heads", "buckets")) if is_table else None

    def parameters(self) -> Bias:
        return None if self.table is None else self.table[...]

    def added_to(self, attend: Attend, parameters: Bias) -> Attend:
        """`attend` with the bias among its options."""
        match self.config:
            case RelativeBiasConfig():
                spec = RelativeBias(self.config.num_buckets, self.config.max_distance, self.bidirectional)
                return partial(attend, relative_bias=(spec, parameters))
            case AlibiConfig():
                return partial(attend, alibi_slopes=alibi_slopes(self.num_heads))
        return attend
