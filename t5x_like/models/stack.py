"""A stack of blocks: the one place that decides scanning over layers and rematerialisation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.biases import RelativeBias, alibi_slopes
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.randomness import fold_in
from t5x_like.models.block import Block, BlockConfig, BlockState, Encoded
from t5x_like.models.feedforward.routers import RouterStats
from t5x_like.models.mixers.attention import Attend, TokenInfo, attend_within
from t5x_like.models.mixers.latent_attention import LatentAttentionConfig
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
from t5x_like.models.probe import in_layer
from t5x_like.models.remat import NAMED_TENSORS, Remat, checkpointed
from t5x_like.sharding.pipeline import gpipe as pipeline

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
      schedule: `gpipe`: all microbatches forward, then all backward, so that a stage keeps the inputs of all; `1f1b`:
        each goes backward as soon as it is through, so that a stage keeps the inputs of 2 * stages - 3 at most. That
        one recomputes the forward pass of a stage, and has no repeats; embedding and head run once per microbatch.
    """

    num_microbatches: int = 8
    repeats: int = 1
    schedule: Literal["gpipe", "1f1b"] = "gpipe"

    def __post_init__(self):
        for name in ("num_microbatches", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"PipelineConfig.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.schedule == "1f1b" and self.repeats > 1:
            raise UserError(f"PipelineConfig.schedule is 1f1b with repeats = {self.repeats}: only gpipe has repeats.")


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
      remat: what the backward pass finds of the forward pass: `none` recomputes what is elementwise at most; `full`
        keeps each block's input only; `dots` keeps the results of the projections; `names` keeps `remat_names`;
        `offload` keeps `remat_names` in host memory. The rest is recomputed.
      remat_names: tensors kept by `names` and `offload`, among query, key, value, attention, mlp, gate.
      pipeline: how the scanned cycles are pipelined where the mesh has stages.
    """

    num_layers: int
    block: BlockConfig | tuple[BlockConfig, ...]
    first: tuple[BlockConfig, ...] = ()
    position_bias: RelativeBiasConfig | AlibiConfig | None = None
    final_norm: NormConfig | None = NormConfig()
    scan_layers: bool = True
    remat: Remat = "none"
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
        kind, attentions = type(self.position_bias).__name__, [block.mixer for block in self.distinct]
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
        return checkpointed(function, self.remat, self.remat_names, in_scan=in_scan)


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
        """Runs all layers; what belongs to scanned layers is stacked over the cycles.

        `dropout_key` is one, or one per row, which a pipeline needs; without it there is no dropout.
        """
        run = self.run_of(Rows(tokens, encoded, dropout_key), attend)
        given = {"scanned": {}, "unrolled": {}} if states is None else states
        x, begun = self.begin(x, run, given["unrolled"])
        x, cycles = self.run_cycles(x, run, given["scanned"])
        x, ended = self.end(x, run, given["unrolled"])
        states, stats = (
            {kind: {i: both[which] for i, both in layers.items()} for kind, layers in new.items()}
            for new in ({"scanned": cycles, "unrolled": begun | ended},)
            for which in (0, 1)
        )
        return StackOutput(x, states, stats)

    def run_of(self, rows: "Rows", attend: Attend = attend_within) -> "Run":
        return Run(partial(self.position_bias.added_to, attend), self.position_bias.parameters(), rows)

    def begin(self, x: Vectors, run: "Run", states: dict[str, BlockState]) -> tuple[Vectors, LayerResults]:
        """The layers before the cycles."""
        return self.run_unrolled(x, [i for i in self.config.unrolled if i < len(self.config.first)], run, states)

    def end(self, x: Vectors, run: "Run", states: dict[str, BlockState]) -> tuple[Vectors, LayerResults]:
        """The layers behind the cycles, and the last norm."""
        x, results = self.run_unrolled(x, [i for i in self.config.unrolled if i >= len(self.config.first)], run, states)
        return x if self.final_norm is None else self.final_norm(x), results

    def run_unrolled(
        self, x: Vectors, layers: Sequence[int], run: "Run", states: dict[str, BlockState]
    ) -> tuple[Vectors, LayerResults]:
        results = {}
        for i in layers:
            graphdef, params = split(self.unrolled[str(i)])
            layer = self.config.checkpointed(partial(run.layer, graphdef), in_scan=False)
            x, *results[str(i)] = layer(x, params, states.get(str(i)), jnp.int32(i), run.rows, run.bias)
        return x, results

    def run_cycles(self, x: Vectors, run: "Run", states: dict[str, BlockState]) -> tuple[Vectors, LayerResults]:
        """Scans the cycles, or, where the mesh has stages, pipelines them."""
        config, count = self.config, self.config.num_cycles
        if not count:
            return x, {}
        layers = split(self.scanned)[1], states, jnp.arange(count)
        stages = pipeline.num_stages()
        if stages == 1 or states:
            return self.scan_cycles(x, layers, run)
        schedule = config.pipeline
        padding = pipeline.padding(count, stages, schedule.repeats)
        x, results = pipeline.pipelined(
            lambda layers, x, rows, bias: self.scan_cycles(
                x, layers, run._replace(rows=rows, bias=bias), padded=padding > 0
            ),
            (pipeline.padded(layers[0], padding), {}, jnp.arange(count + padding)),
            x,
            run.rows,
            run.bias,
            num_microbatches=schedule.num_microbatches,
            repeats=schedule.repeats,
        )
        return x, jax.tree.map(lambda a: a[:count], results)

    def scan_cycles(
        self, x: Vectors, layers: tuple[Params, Any, Array], run: "Run", *, padded: bool = False
    ) -> tuple[Vectors, LayerResults]:
        """Runs cycles, given as their parameters, states and numbers.

        With `padded` those whose number is beyond the last are skipped, and give zeros as results.
        """
        config, size = self.config, len(self.config.cycle)
        graphdefs = [split(self.scanned[str(i)])[0] for i in range(size)]
        blocks = [config.checkpointed(partial(run.layer, graphdef), in_scan=True) for graphdef in graphdefs]

        def cycle(x: Vectors, layer: tuple[Params, Any, Array]) -> tuple[Vectors, LayerResults]:
            params, states, number = layer
            results, begin = {}, len(config.first) + number * size
            for i, block in enumerate(blocks):
                x, *results[str(i)] = block(x, params[str(i)], states.get(str(i)), begin + i, run.rows, run.bias)
            return x, results

        def cycle_or_nothing(x, layer):
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(cycle, x, layer)[1])
            return lax.cond(layer[2] < config.num_cycles, cycle, lambda x, _: (x, zeros), x, layer)

        return lax.scan(cycle_or_nothing if padded else cycle, x, layers)


class Rows(NamedTuple):
    """What belongs to the rows of a batch, beside the vectors.

    Attributes:
      tokens: whose vectors they are.
      encoded: what a decoder attends to.
      dropout_key: one, or one per row; None: no dropout.
    """

    tokens: TokenInfo
    encoded: Encoded | None = None
    dropout_key: PRNGKeyArray | None = None


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
        number: Int[Array, ""],
        rows: Rows,
        bias: Bias,
    ) -> tuple[Vectors, BlockState | None, RouterStats | None]:
        """One layer; its number makes its random numbers."""
        block, attend = merge(graphdef, params), self.attend_with(bias)
        key = None if rows.dropout_key is None else fold_in(rows.dropout_key, number)
        with in_layer("stack" if rows.encoded is None else "decoder", number):
            return block(x, tokens=rows.tokens, attend=attend, encoded=rows.encoded, state=state, dropout_key=key)


class PositionBias(Module):
    """The bias that a stack's layers share, by distance of query and key: T5's table, or ALiBi's slopes."""

    def __init__(self, config: StackConfig, *, bidirectional: bool, init: Initializer, key: PRNGKeyArray):
        self.config = config.position_bias
        self.num_heads = config.blocks[0].mixer.num_heads
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
