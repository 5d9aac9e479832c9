"""Attention on GPU: prepares arrays for the Pallas kernels in triton_forward.py and triton_backward.py.

Arrays keep the layout [batch length heads head_dim]: programs read and write it in place.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.kernels.attention import triton_backward, triton_forward
from t5x_like.kernels.attention.biases import relative_bias
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import differentiable
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks, gpu_tuning
from t5x_like.kernels.attention.prepared import Fixed, Inputs, Plan, in_blocks, prepare, tokens_in_blocks
from t5x_like.kernels.attention.triton_tiles import Context, Side, make_visits
from t5x_like.kernels.target import target_chip


def triton_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]:
    """Attention by Pallas kernels."""
    return run(_attend, call)


def run(
    attend: Callable, call: AttentionCall
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]:
    """Gives the arrays of a call to a function of `flash.differentiable`."""
    tuning = gpu_tuning(target_chip(), max(call.q.shape[3], call.v.shape[3]), call.q.dtype)
    plan, fixed = prepare(call, tuning)
    return attend(plan, (call.q, call.k, call.v, call.table), fixed, call.sinks)


def inputs_in_blocks(
    plan: Plan,
    blocks: GpuBlocks,
    trained: tuple,
    fixed: Fixed,
    strip: Float[Array, "heads x"] | None,
    *,
    side: int,
    outer: tuple[Array, Array, Array] | None = None,
) -> Inputs:
    """What a kernel reads whose programs have a block of queries (`side` 0) or of keys (1) each."""
    lengths = (trained[0].shape[1], trained[1].shape[1])
    tokens = tokens_in_blocks(plan, fixed, lengths, blocks.q, blocks.kv)
    sides = [
        Side(
            positions=tokens.positions[n].astype(jnp.int32) if plan.given_positions else None,
            segments=None if tokens.segment_ids is None else tokens.segment_ids[n].astype(jnp.int32),
        )
        for n in (0, 1)
    ]
    visits = make_visits(plan, tokens, blocks)[side]
    context = Context(visits, jnp.asarray(fixed.offsets, jnp.int32), *sides, strip, fixed.alibi_slopes)
    if outer is not None:
        do, lse, delta = outer
        outer = (do, lse.swapaxes(1, 2), delta.swapaxes(1, 2))
    return in_blocks(trained, context, outer, axis=1, q_block=blocks.q, kv_block=blocks.kv)


def _strip(plan: Plan, table: Float[Array, "heads num_buckets"]) -> Float[Array, "heads two_reach_and_one"]:
    """The relative bias at key position minus query position from -reach to reach."""
    return relative_bias(plan.relative_bias, table, jnp.arange(-plan.reach, plan.reach + 1))


def _forward(plan: Plan, trained: tuple, fixed: Fixed):
    q, k, _, table = trained
    blocks = plan.tuning.forward.fit(q.shape[1], k.shape[1])
    strip = None if table is None else _strip(plan, table)
    o, lse = triton_forward.forward(plan, blocks, inputs_in_blocks(plan, blocks, trained, fixed, strip, side=0))
    return o[:, : q.shape[1]], lse[:, :, : q.shape[1]].swapaxes(1, 2)


def backward(plan: Plan, trained: tuple, fixed: Fixed, lse: Array, delta: Array, do: Array):
    """The backward pass for `flash.differentiable`, whatever made the output."""
    q, k, _, table = trained
    lengths = (q.shape[1], k.shape[1])
    strip, pull_strip = None, None
    if table is not None:
        strip, pull_strip = jax.vjp(lambda table: _strip(plan, table), table)
    inputs = lambda blocks, side: inputs_in_blocks(
        plan, blocks, trained, fixed, strip, side=side, outer=(do, lse, delta)
    )
    for_q, for_kv = plan.tuning.dq.fit(*lengths), plan.tuning.dkv.fit(*lengths)
    dq, strip_sums = triton_backward.backward_q(plan, for_q, inputs(for_q, 0))
    dk, dv = triton_backward.backward_kv(plan, for_kv, inputs(for_kv, 1))
    dtable = None if table is None else pull_strip(strip_sums.total())[0]
    return dq[:, : lengths[0]], dk[:, : lengths[1]], dv[:, : lengths[1]], dtable


_attend = differentiable(_forward, backward)
