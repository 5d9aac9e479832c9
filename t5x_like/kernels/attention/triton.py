"""Attention on GPU: prepares arrays for the Pallas kernels in triton_forward.py and triton_backward.py.

Arrays keep the layout [batch length heads head_dim]: programs read and write it in place.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention import triton_backward, triton_forward
from t5x_like.kernels.attention.biases import relative_bias
from t5x_like.kernels.attention.blocks import Tokens, consecutive, padded_tokens
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import differentiable
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks, gpu_tuning
from t5x_like.kernels.attention.triton_tiles import Biases, Plan, Side, make_visits
from t5x_like.kernels.padding import pad
from t5x_like.kernels.target import interpreted, target_chip

NEVER = 1e30
"""Log-sum-exp of a padded query: its weights are exactly 0."""


class Fixed(NamedTuple):
    """Arrays without gradients; positions are None where `Plan.offsets` has them."""

    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]] | None
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None
    offsets: tuple[Int[Array, ""], Int[Array, ""]]
    alibi_slopes: Float[Array, "heads"] | None


class _Layout(NamedTuple):
    """A call in blocks."""

    visits: tuple[Int[Array, "#batch q_blocks 6"], Int[Array, "#batch kv_blocks 6"]]
    queries: Side
    keys: Side
    biases: Biases


def triton_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]:
    """Attention by Pallas kernels. See `attention` for the arguments."""
    return run(_attend, call)


def run(
    attend: Callable, call: AttentionCall
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]:
    """Gives the arrays of a call to a function of `flash.differentiable`."""
    offsets = call.known_offsets
    table = call.table
    plan = Plan(
        mask=call.mask,
        scale=call.scale,
        soft_cap=call.soft_cap,
        relative_bias=call.relative_bias,
        offsets=offsets,
        given_positions=call.offsets is None,
        tuning=gpu_tuning(target_chip(), max(call.q.shape[3], call.v.shape[3]), call.q.dtype),
        interpreted=interpreted(),
        exact_output=table is not None or call.sinks is not None,
    )
    slopes = None if call.alibi_slopes is None else call.alibi_slopes.astype(jnp.float32)
    fixed = Fixed(None if offsets else call.each_position, call.segment_ids, call.offsets or (0, 0), slopes)
    return attend(plan, (call.q, call.k, call.v, table), fixed, call.sinks)


def _layout(
    plan: Plan, blocks: GpuBlocks, fixed: Fixed, lengths: tuple[int, int], strip: Float[Array, "heads x"] | None
) -> _Layout:
    positions = fixed.positions
    if positions is None:
        positions = tuple(map(consecutive, plan.offsets, lengths))
    tokens = padded_tokens(Tokens(positions, fixed.segment_ids), blocks.q, blocks.kv)
    sides = [
        Side(
            positions=tokens.positions[side].astype(jnp.int32) if plan.given_positions else None,
            segments=None if tokens.segment_ids is None else tokens.segment_ids[side].astype(jnp.int32),
        )
        for side in (0, 1)
    ]
    biases = Biases(jnp.asarray(fixed.offsets, jnp.int32), strip, fixed.alibi_slopes)
    return _Layout(make_visits(plan, tokens, blocks), *sides, biases)


def _strip(plan: Plan, table: Float[Array, "heads num_buckets"]) -> Float[Array, "heads two_reach_and_one"]:
    """The relative bias at key position minus query position from -reach to reach."""
    return relative_bias(plan.relative_bias, table, jnp.arange(-plan.reach, plan.reach + 1))


def _forward(plan: Plan, trained: tuple, fixed: Fixed):
    q, k, v, table = trained
    q_length, kv_length = q.shape[1], k.shape[1]
    blocks = plan.tuning.forward.fit(q_length, kv_length)
    strip = None if table is None else _strip(plan, table)
    layout = _layout(plan, blocks, fixed, (q_length, kv_length), strip)
    inputs = triton_forward.Inputs(
        q=pad(q, 1, blocks.q),
        k=pad(k, 1, blocks.kv),
        v=pad(v, 1, blocks.kv),
        visits=layout.visits[0],
        queries=layout.queries,
        keys=layout.keys,
        biases=layout.biases,
    )
    o, lse = triton_forward.forward(plan, blocks, inputs)
    return o[:, :q_length], lse[:, :, :q_length].swapaxes(1, 2)


def backward(plan: Plan, trained: tuple, fixed: Fixed, lse: Array, delta: Array, do: Array):
    """The backward pass for `flash.differentiable`, whatever made the output."""
    q, k, v, table = trained
    lengths = (q.shape[1], k.shape[1])
    strip, pull_strip = None, None
    if table is not None:
        strip, pull_strip = jax.vjp(lambda table: _strip(plan, table), table)

    def inputs(blocks: GpuBlocks, side: int) -> triton_backward.Inputs:
        layout = _layout(plan, blocks, fixed, lengths, strip)
        return triton_backward.Inputs(
            q=pad(q, 1, blocks.q),
            k=pad(k, 1, blocks.kv),
            v=pad(v, 1, blocks.kv),
            do=pad(do, 1, blocks.q),
            lse=pad(lse.swapaxes(1, 2), 2, blocks.q, NEVER),
            delta=pad(delta.swapaxes(1, 2), 2, blocks.q),
            visits=layout.visits[side],
            queries=layout.queries,
            keys=layout.keys,
            biases=layout.biases,
        )

    for_q, for_kv = plan.tuning.dq.fit(*lengths), plan.tuning.dkv.fit(*lengths)
    dq, strip_sums = triton_backward.backward_q(plan, for_q, inputs(for_q, 0))
    dk, dv = triton_backward.backward_kv(plan, for_kv, inputs(for_kv, 1))
    dtable = None if table is None else pull_strip(strip_sums.total())[0]
    return dq[:, : lengths[0]], dk[:, : lengths[1]], dv[:, : lengths[1]], dtable


_attend = differentiable(_forward, backward)
