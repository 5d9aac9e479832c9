"""What kernels make of a call first: its static part, its arrays without gradients, and all arrays in whole blocks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.block_sizes import Tuning
from t5x_like.kernels.attention.blocks import Tokens, consecutive, padded_tokens
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.gpu_block_sizes import GpuTuning
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.padding import pad
from t5x_like.kernels.target import interpreted

NEVER = 1e30
"""Log-sum-exp of a padded query: its weights are exactly 0."""


@dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
      mask: as in `AttentionCall`, like the three after it.
      offsets: the first positions, if known while tracing.
      given_positions: whether positions come as arrays.
      tuning: block sizes of the backend.
      interpreted: whether GPU kernels are.
      exact_output: whether the forward pass leaves its output in float32.
    """

    mask: MaskSpec
    scale: float
    soft_cap: float | None
    relative_bias: RelativeBias | None
    offsets: tuple[int, int] | None
    given_positions: bool
    tuning: Tuning | GpuTuning
    interpreted: bool = False
    exact_output: bool = False

    @property
    def reach(self) -> int:
        """The distance from which on the relative bias is constant."""
        return self.relative_bias.max_distance


class Fixed(NamedTuple):
    """Arrays without gradients; positions are None where `Plan.offsets` has them."""

    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]] | None
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None
    offsets: tuple[Int[Array, ""], Int[Array, ""]]
    alibi_slopes: Float[Array, "heads"] | None


class Inputs(NamedTuple):
    """What a kernel reads; lengths are whole blocks, and dims in the order of the backend.

    Attributes:
      context: what its backend needs besides.
      do: the gradient of the output; it and what follows belong to the backward pass.
      lse: log-sum-exp of each query.
      delta: see flash.py.
    """

    q: Float[Any, "..."]
    k: Float[Any, "..."]
    v: Float[Any, "..."]
    context: Any
    do: Float[Any, "..."] | None = None
    lse: Float[Any, "..."] | None = None
    delta: Float[Any, "..."] | None = None


def prepare(call: AttentionCall, tuning: Tuning | GpuTuning) -> tuple[Plan, Fixed]:
    known = call.known_offsets
    plan = Plan(
        mask=call.mask,
        scale=call.scale,
        soft_cap=call.soft_cap,
        relative_bias=call.relative_bias,
        offsets=known,
        given_positions=call.offsets is None,
        tuning=tuning,
        interpreted=interpreted(),
        exact_output=call.table is not None or call.sinks is not None,
    )
    slopes = None if call.alibi_slopes is None else call.alibi_slopes.astype(jnp.float32)
    return plan, Fixed(None if known else call.each_position, call.segment_ids, call.offsets or (0, 0), slopes)


def tokens_in_blocks(plan: Plan, fixed: Fixed, lengths: tuple[int, int], q_block: int, kv_block: int) -> Tokens:
    positions = fixed.positions
    if positions is None:
        positions = tuple(map(consecutive, plan.offsets, lengths))
    return padded_tokens(Tokens(positions, fixed.segment_ids), q_block, kv_block)


def in_blocks(
    trained: tuple, context: Any, outer: tuple[Array, Array, Array] | None, *, axis: int, q_block: int, kv_block: int
) -> Inputs:
    """Pads q, k and v along `axis`, and in the backward pass `outer`: do, and lse and delta [batch heads length]."""
    q, k, v, _ = trained
    inputs = Inputs(pad(q, axis, q_block), pad(k, axis, kv_block), pad(v, axis, kv_block), context)
    if outer is None:
        return inputs
    do, lse, delta = outer
    return inputs._replace(do=pad(do, axis, q_block), lse=pad(lse, 2, q_block, NEVER), delta=pad(delta, 2, q_block))
