"""Attention on TPU: prepares arrays for the Pallas kernels in tpu_forward.py and tpu_backward.py."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention import tpu_backward, tpu_forward
from t5x_like.kernels.attention.block_sizes import BlockSizes, tuning
from t5x_like.kernels.attention.blocks import Ranges, Tokens, block_ranges
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import differentiable
from t5x_like.kernels.attention.prepared import Fixed, Plan, in_blocks, prepare, tokens_in_blocks
from t5x_like.kernels.attention.tpu_specs import SUBLANES, Context, Scalars
from t5x_like.kernels.attention.tpu_tiles import make_strip
from t5x_like.kernels.target import target_chip


def tpu_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]:
    """Attention by Pallas kernels."""
    plan, fixed = prepare(call, tuning(target_chip()))
    q, k, v = (array.swapaxes(1, 2) for array in (call.q, call.k, call.v))
    o, lse = _attend(plan, (q, k, v, call.table), fixed, None if call.sinks is None else call.sinks[:, None])
    return o.swapaxes(1, 2), lse.swapaxes(1, 2)


def _layout(
    plan: Plan,
    sizes: BlockSizes,
    fixed: Fixed,
    lengths: tuple[int, int],
    strip: Float[Array, "heads 1 two_reach"] | None,
) -> tuple[Ranges, Scalars, Context]:
    tokens = tokens_in_blocks(plan, fixed, lengths, sizes.q, sizes.kv)
    ranges = block_ranges(plan.mask, tokens, sizes.q, sizes.kv)
    scalars = Scalars(ranges.table.reshape(-1), jnp.asarray([*fixed.offsets, 0], jnp.int32))
    q_rows = kv_rows = None
    if plan.given_positions or tokens.segment_ids is not None:
        q_rows, kv_rows = (_rows(tokens, side) for side in (0, 1))
    return ranges, scalars, Context(q_rows, kv_rows, strip, fixed.alibi_slopes)


def _rows(tokens: Tokens, side: int) -> Int[Array, "#batch 8 length"]:
    """Positions and segments as the first two of 8 rows, the smallest block there is."""
    positions = jnp.asarray(tokens.positions[side])
    segments = jnp.ones_like(positions) if tokens.segment_ids is None else tokens.segment_ids[side]
    pair = jnp.stack(jnp.broadcast_arrays(positions, segments), axis=1).astype(jnp.int32)
    return jnp.pad(pair, ((0, 0), (0, SUBLANES - 2), (0, 0)))


def _forward(plan: Plan, trained: tuple, fixed: Fixed):
    q, k, _, table = trained
    q_length, kv_length = q.shape[2], k.shape[2]
    sizes = plan.tuning.forward_for(plan.mask.span(max(q_length, kv_length))).fit(q_length, kv_length)
    strip = None if table is None else make_strip(plan, sizes, table)
    ranges, scalars, context = _layout(plan, sizes, fixed, (q_length, kv_length), strip)
    inputs = in_blocks(trained, context, None, axis=2, q_block=sizes.q, kv_block=sizes.kv)
    o, lse = tpu_forward.forward(plan, sizes, ranges, scalars, inputs)
    return o[:, :, :q_length], lse[:, :, 0, :q_length]


def _backward(plan: Plan, trained: tuple, fixed: Fixed, lse: Array, delta: Array, do: Array):
    q, k, v, table = trained
    q_length, kv_length = q.shape[2], k.shape[2]
    sizes = plan.tuning.backward.fit(q_length, kv_length)
    part_blocks, num_parts = _parts(plan, sizes, kv_length, q.shape[3] + v.shape[3])
    strip, pull_strip = None, None
    if table is not None:
        strip, pull_strip = jax.vjp(lambda table: make_strip(plan, sizes, table), table)
    whole = part_blocks * num_parts * sizes.kv
    ranges, scalars, context = _layout(plan, sizes, fixed, (q_length, kv_length), strip)
    inputs = in_blocks(trained, context, (do, lse, delta), axis=2, q_block=sizes.q, kv_block=whole)
    inputs = inputs._replace(lse=inputs.lse[:, :, None], delta=inputs.delta[:, :, None])
    gradients = tpu_backward.backward(plan, sizes, ranges, scalars, inputs, part_blocks)
    dq = gradients.q[:, :, :q_length].astype(q.dtype)
    dtable = None if table is None else pull_strip(gradients.strip.sum(axis=0))[0]
    return dq, gradients.k[:, :, :kv_length], gradients.v[:, :, :kv_length], dtable


def _parts(plan: Plan, sizes: BlockSizes, kv_length: int, dims: int) -> tuple[int, int]:
    """Key blocks of a part, and parts: the gradients of a part are kept as sums, and twice as results."""
    num_blocks = -(-kv_length // sizes.kv)
    most = max(1, plan.tuning.resident_keys(8 * dims) // sizes.kv)
    num_parts = -(-num_blocks // most)
    return -(-num_blocks // num_parts), num_parts


_attend = differentiable(_forward, _backward)
