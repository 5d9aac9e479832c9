"""A stack of blocks: the one place that decides scanning over layers and rematerialisation."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable, inert
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.randomness import fold_in
from t5x_like.models.block import Block, BlockConfig, BlockState
from t5x_like.models.context import Bias, Context
from t5x_like.models.feedforward.router_stats import RouterStats
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.mixers.mixer import Mixer
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import (
    Initializer,
    Initializers,
    Module,
    ModuleDict,
    Params,
    merge,
    split,
    stack_modules,
)
from t5x_like.models.position_biases import PositionBias
from t5x_like.models.probe import Sizes, layer_sizes
from t5x_like.models.remat import NAMED_TENSORS, Remat, checkpointed
from t5x_like.sharding.pipeline import gpipe as pipeline

Vectors = Float[Array, "batch length embed"]
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
        one recomputes the forward pass of a stage, and has no repeats; embedding and head run once per microbatch. An
        encoder before a decoder runs by `gpipe` either way: with `1f1b` once forward, and again for its gradient.
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
    position_bias: PositionBias | None = None
    final_norm: Norm | None = NormConfig()
    scan_layers: bool = inert(True)
    remat: Remat = inert("none")
    remat_names: tuple[str, ...] = inert(())
    pipeline: PipelineConfig = inert(PipelineConfig())

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
        kind = type(self.position_bias).__name__
        if any(mixer.has_rotary for mixer in self.mixers):
            raise UserError(
                f"StackConfig.position_bias is {kind} and its attention has rotary positions: a model has one or the "
                "other. Set AttentionConfig.rotary = None or StackConfig.position_bias = None."
            )
        heads = {mixer.num_heads for mixer in self.mixers if mixer.takes_bias}
        if not heads:
            raise UserError(f"StackConfig.position_bias is {kind}, but none of its mixers takes one: set it to None.")
        if len(heads) > 1:
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
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers of these."""
        return tuple(block.mixer for block in self.distinct if block.mixer is not None)

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

    def build_bias(self, *, bidirectional: bool, init: Initializer, key: PRNGKeyArray) -> Module | None:
        """The layer that makes the bias which all layers share."""
        if self.position_bias is None:
            return None
        num_heads = next(mixer.num_heads for mixer in self.mixers if mixer.takes_bias)
        return self.position_bias.build(num_heads, bidirectional=bidirectional, init=init, key=key)

    def checkpointed(self, function: Callable, *, in_scan: bool) -> Callable:
        """`function` with this remat policy."""
        return checkpointed(function, self.remat, self.remat_names, in_scan=in_scan)


class LayerResult(NamedTuple):
    """What a layer gives beside the vectors.

    Attributes:
      state: of decoding; None without.
      stats: of the router; None without one.
      sizes: of the activations; empty unless somebody is looking.
    """

    state: BlockState | None
    stats: RouterStats | None
    sizes: Sizes


LayerResults = dict[str, LayerResult]
"""By place in the cycle or number of the layer."""


class StackOutput(NamedTuple):
    """What a stack returns.

    Attributes:
      x: the vectors behind the last layer, normalised.
      results: of the layers, in the form of `States`.
    """

    x: Float[Array, "batch length embed"]
    results: dict[str, LayerResults]

    @property
    def states(self) -> States:
        return {kind: {i: result.state for i, result in layers.items()} for kind, layers in self.results.items()}

    @property
    def stats(self) -> dict[str, dict[str, RouterStats | None]]:
        return {kind: {i: result.stats for i, result in layers.items()} for kind, layers in self.results.items()}


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
        spec = LayerSpec(d_model, mask, inits, dtype)
        build = lambda block, key: Block(block, spec, key)
        blocks, begin, size = config.blocks, len(config.first), len(config.cycle)
        layers = lambda place: keys[begin + place : begin + config.num_cycles * size : size]
        scanned = {str(i): stack_modules(partial(build, config.cycle[i]), layers(i)) for i in range(size)}
        unrolled = {str(i): build(blocks[i], keys[i]) for i in config.unrolled}
        self.scanned = ModuleDict(scanned) if config.num_cycles else None
        self.unrolled = ModuleDict(unrolled) if unrolled else None
        self.position_bias = config.build_bias(bidirectional=not mask.causal, init=inits.kernel, key=keys[-1])
        self.final_norm = None if config.final_norm is None else config.final_norm.build(d_model)
        self.config = config

    def bias(self) -> Bias:
        """What all layers add to attention."""
        return Bias() if self.position_bias is None else self.position_bias()

    def begin(self, x: Vectors, context: Context, states: dict[str, BlockState]) -> tuple[Vectors, LayerResults]:
        """The layers before the cycles."""
        return self.run_unrolled(x, [i for i in self.config.unrolled if i < len(self.config.first)], context, states)

    def end(self, x: Vectors, context: Context, states: dict[str, BlockState]) -> tuple[Vectors, LayerResults]:
        """The layers behind the cycles, and the last norm."""
        x, results = self.run_unrolled(
            x, [i for i in self.config.unrolled if i >= len(self.config.first)], context, states
        )
        return x if self.final_norm is None else self.final_norm(x), results

    def run_unrolled(
        self, x: Vectors, layers: Sequence[int], context: Context, states: dict[str, BlockState]
    ) -> tuple[Vectors, LayerResults]:
        results = {}
        for i in layers:
            layer = self.config.checkpointed(partial(run_layer, self.unrolled[str(i)]), in_scan=False)
            x, results[str(i)] = layer(x, states.get(str(i)), jnp.int32(i), context)
        return x, results

    def run_cycles(self, x: Vectors, context: Context, states: dict[str, BlockState]) -> tuple[Vectors, LayerResults]:
        """Scans the cycles, or, where the mesh has stages, pipelines them."""
        config, count = self.config, self.config.num_cycles
        if not count:
            return x, {}
        layers = split(self.scanned)[1], states, jnp.arange(count)
        stages = pipeline.num_stages()
        if stages == 1 or states:
            return self.scan_cycles(x, layers, context)
        schedule = config.pipeline
        padding = pipeline.padding(count, stages, schedule.repeats)
        x, results = pipeline.pipelined(
            lambda layers, x, rows, bias: self.scan_cycles(
                x, layers, dataclasses.replace(rows, bias=bias), padded=padding > 0
            ),
            (pipeline.padded(layers[0], padding), {}, jnp.arange(count + padding)),
            x,
            dataclasses.replace(context, bias=None, embed_key=None),
            context.bias,
            num_microbatches=schedule.num_microbatches,
            repeats=schedule.repeats,
        )
        return x, jax.tree.map(lambda a: a[:count], results)

    def scan_cycles(
        self, x: Vectors, layers: tuple[Params, Any, Array], context: Context, *, padded: bool = False
    ) -> tuple[Vectors, LayerResults]:
        """Runs cycles, given as their parameters, states and numbers.

        With `padded` those whose number is beyond the last are skipped, and give zeros as results.
        """
        config, size = self.config, len(self.config.cycle)
        graphdefs = [split(self.scanned[str(i)])[0] for i in range(size)]

        def cycle(x: Vectors, layer: tuple[Params, Any, Array]) -> tuple[Vectors, LayerResults]:
            params, states, number = layer
            results, begin = {}, len(config.first) + number * size
            for i, graphdef in enumerate(graphdefs):
                layer = config.checkpointed(partial(run_layer, merge(graphdef, params[str(i)])), in_scan=True)
                x, results[str(i)] = layer(x, states.get(str(i)), begin + i, context)
            return x, results

        def cycle_or_nothing(x, layer):
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(cycle, x, layer)[1])
            return lax.cond(layer[2] < config.num_cycles, cycle, lambda x, _: (x, zeros), x, layer)

        return lax.scan(cycle_or_nothing if padded else cycle, x, layers)


def run_layer(
    block: Block,
    x: Vectors,
    state: BlockState | None,
    number: Int[Array, ""],
    context: Context,
) -> tuple[Vectors, LayerResult]:
    """One layer; its number makes its random numbers."""
    if context.dropout_key is not None:
        context = context.with_key(fold_in(context.dropout_key, number))
    with layer_sizes() as sizes:
        x, *result = block(x, context, state)
    return x, LayerResult(*result, sizes)
