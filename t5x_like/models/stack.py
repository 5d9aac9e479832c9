"""A stack of blocks: the one place that decides scanning over layers and rematerialisation."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.biases import RelativeBias, alibi_slopes
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.attention import Attend
from t5x_like.models.block import Block, BlockConfig, BlockState, Encoded, RouterStats, TokenInfo
from t5x_like.models.latent_attention import LatentAttentionConfig
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import (
    Initializer,
    Initializers,
    Module,
    ModuleDict,
    merge,
    parameter,
    split,
    stack_modules,
)
from t5x_like.models.positions import AlibiConfig, RelativeBiasConfig

NAMED_TENSORS = ("query", "key", "value", "attention", "mlp", "gate")
"""What a block names with `checkpoint_name`, in the order it is computed; the kernels name `attention` themselves."""

States = dict[str, dict[str, BlockState]]
"""By `scanned` or `unrolled`, then by place in the cycle or number of the layer."""


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
    """

    num_layers: int
    block: BlockConfig | tuple[BlockConfig, ...]
    first: tuple[BlockConfig, ...] = ()
    position_bias: RelativeBiasConfig | AlibiConfig | None = None
    final_norm: NormConfig | None = NormConfig()
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "names", "offload"] = "none"
    remat_names: tuple[str, ...] = ()

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
        attend: Attend,
        encoded: Encoded | None = None,
        states: States | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> StackOutput:
        """Runs all layers; what belongs to scanned layers is stacked over the cycles."""
        num_layers, begin, size = self.config.num_layers, len(self.config.first), len(self.config.cycle)
        keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)
        attend = self.position_bias.added_to(attend)
        new = {"scanned": {}, "unrolled": {}}

        def run(graphdef, x, params, state, key):
            block = merge(graphdef, params)
            return block(x, tokens=tokens, attend=attend, encoded=encoded, state=state, dropout_key=key)

        def run_unrolled(x, layers):
            for i in map(str, layers):
                graphdef, params = split(self.unrolled[i])
                state = None if states is None else states["unrolled"][i]
                key = None if keys is None else keys[int(i)]
                layer = self.config.checkpointed(partial(run, graphdef), in_scan=False)
                x, *new["unrolled"][i] = layer(x, params, state, key)
            return x

        x = run_unrolled(x, [i for i in self.config.unrolled if i < begin])
        if self.config.num_cycles:
            graphdefs, params = zip(*(split(self.scanned[str(i)]) for i in range(size)), strict=True)
            end = begin + self.config.num_cycles * size
            keys_of_cycles = None if keys is None else keys[begin:end].reshape(-1, size)
            states_of_cycles = None if states is None else [states["scanned"][str(i)] for i in range(size)]
            layers = [self.config.checkpointed(partial(run, graphdef), in_scan=True) for graphdef in graphdefs]

            def body(x, cycle):
                params, states, keys = cycle
                new = {}
                for i, layer in enumerate(layers):
                    of_layer = lambda all_of_cycle, i=i: None if all_of_cycle is None else all_of_cycle[i]
                    x, *new[str(i)] = layer(x, params[i], of_layer(states), of_layer(keys))
                return x, new

            x, new["scanned"] = lax.scan(body, x, (params, states_of_cycles, keys_of_cycles))
        x = run_unrolled(x, [i for i in self.config.unrolled if i >= begin])
        x = x if self.final_norm is None else self.final_norm(x)
        states, stats = (
            {kind: {i: both[which] for i, both in layers.items()} for kind, layers in new.items()} for which in (0, 1)
        )
        return StackOutput(x, states, stats)


class PositionBias(Module):
    """The bias that a stack's layers share, by distance of query and key: T5's table, or ALiBi's slopes."""

    def __init__(self, config: StackConfig, *, bidirectional: bool, init: Initializer, key: PRNGKeyArray):
        self.config = config.position_bias
        self.num_heads = config.blocks[0].attention.num_heads
        self.bidirectional = bidirectional
        is_table = isinstance(self.config, RelativeBiasConfig)
        shape = (self.num_heads, self.config.num_buckets if is_table else 0)
        self.table = parameter(init(key, shape, *shape[::-1]), ("heads", "buckets")) if is_table else None

    def added_to(self, attend: Attend) -> Attend:
        """`attend` with the bias among its options."""
        match self.config:
            case RelativeBiasConfig():
                spec = RelativeBias(self.config.num_buckets, self.config.max_distance, self.bidirectional)
                return partial(attend, relative_bias=(spec, self.table[...]))
            case AlibiConfig():
                return partial(attend, alibi_slopes=alibi_slopes(self.num_heads))
        return attend
