"""Attention in plain JAX with memory that grows with the length, not with its square, on any platform.

The online softmax of Milakov and Gimelshein (2018) over chunks of keys (Rabe and Staats 2021), and FlashAttention's
recomputing backward pass (Dao et al. 2022). A chunk of logits is always [batch, heads, q_chunk, kv_chunk]. Chunks that
the mask or the segments rule out for the whole batch are not computed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.biases import RelativeBias, position_bias
from t5x_like.kernels.attention.blocks import (
    Tokens,
    block_ranges,
    consecutive,
    merge_batch,
    padded_tokens,
)
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import differentiable
from t5x_like.kernels.attention.logits import MASK_VALUE, attention_logits
from t5x_like.kernels.attention.masks import MaskSpec, allowed
from t5x_like.kernels.padding import pad
from t5x_like.kernels.randomness import fold_in, keep

CHUNK = 512
"""Queries, and keys, of one chunk."""


@dataclass(frozen=True)
class _Plan:
    mask: MaskSpec
    scale: float
    soft_cap: float | None
    relative_bias: RelativeBias | None
    dropout_rate: float
    q_chunk: int
    kv_chunk: int


class _Fixed(NamedTuple):
    tokens: Tokens
    ranges: Int[Array, "q_chunks 2"]
    alibi_slopes: Float[Array, "heads"] | None
    dropout_key: Array | None


def chunked_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]:
    """Attention in chunks of CHUNK queries and keys. See `attention` for the arguments."""
    _, _, q_length, kv_length = call.scores
    q_chunk, kv_chunk = min(CHUNK, q_length), min(CHUNK, kv_length)
    plan = _Plan(call.mask, call.scale, call.soft_cap, call.relative_bias, call.dropout_rate, q_chunk, kv_chunk)
    offsets = call.known_offsets
    positions = call.each_position if offsets is None else tuple(map(consecutive, offsets, (q_length, kv_length)))
    tokens = padded_tokens(Tokens(positions, call.segment_ids), q_chunk, kv_chunk)
    ranges = merge_batch(block_ranges(call.mask, tokens, q_chunk, kv_chunk))
    fixed = _Fixed(jax.tree.map(jnp.asarray, tokens), ranges, call.alibi_slopes, call.dropout_key)

    q, k, v = (
        pad(array.swapaxes(1, 2), 2, chunk)
        for array, chunk in ((call.q, q_chunk), (call.k, kv_chunk), (call.v, kv_chunk))
    )
    o, lse = _attend(plan, (q, k, v, call.table), fixed, None if call.sinks is None else call.sinks[:, None])
    return o.swapaxes(1, 2)[:, :q_length], lse.swapaxes(1, 2)[:, :q_length]


def _slice(array: Array | None, axis: int, index: Array, size: int) -> Array | None:
    return None if array is None else lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _chunk_of(plan: _Plan, tokens: Tokens, i: Array, j: Array) -> Tokens:
    sizes = ((i, plan.q_chunk), (j, plan.kv_chunk))
    cut = lambda pair: tuple(_slice(array, 1, *size) for array, size in zip(pair, sizes, strict=True))
    return Tokens(cut(tokens.positions), None if tokens.segment_ids is None else cut(tokens.segment_ids))


def _logits(
    plan: _Plan,
    fixed: _Fixed,
    i: Array,
    j: Array,
    q: Float[Array, "batch heads q_chunk head_dim"],
    k: Float[Array, "batch kv_heads kv_chunk head_dim"],
    table: Float[Array, "heads num_buckets"] | None,
) -> Float[Array, "batch heads q_chunk kv_chunk"]:
    """The logits of query chunk i and key chunk j."""
    products = _grouped("bkth,bksh->bkts", q, k)
    tokens = _chunk_of(plan, fixed.tokens, i, j)
    bias = position_bias(plan.relative_bias, table, fixed.alibi_slopes, tokens.positions)
    mask = allowed(plan.mask, tokens.positions, tokens.segment_ids)[:, None]
    return attention_logits(products, mask, bias, scale=plan.scale, soft_cap=plan.soft_cap)


def _grouped(
    equation: str,
    by_query_head: Float[Array, "batch heads q_chunk x"],
    by_kv_head: Float[Array, "batch kv_heads kv_chunk y"],
) -> Float[Array, "batch heads q_chunk z"]:
    """An einsum in which the query heads of a key head are folded into the queries, in and out; float32 out."""
    batch, num_heads, length, size = by_query_head.shape
    folded = by_query_head.reshape(batch, by_kv_head.shape[1], -1, size)
    out = jnp.einsum(equation, folded, by_kv_head, preferred_element_type=jnp.float32)
    return out.reshape(batch, num_heads, length, -1)


def _kept(plan: _Plan, fixed: _Fixed, i: Array, j: Array, weights: Array) -> Array:
    """`weights` after dropout, the same in both passes."""
    if not plan.dropout_rate:
        return weights
    kept = keep(fold_in(fold_in(fixed.dropout_key, i), j), plan.dropout_rate, weights.shape)
    return jnp.where(kept, weights / (1 - plan.dropout_rate), 0)


def _forward(plan: _Plan, trained: tuple, fixed: _Fixed):
    q, k, v, table = trained

    def row(_, i):
        q_i = _slice(q, 2, i, plan.q_chunk)

        def step(j, carry):
            largest, total, o = carry
            logits = _logits(plan, fixed, i, j, q_i, _slice(k, 2, j, plan.kv_chunk), table)
            new = jnp.maximum(largest, logits.max(axis=-1, keepdims=True))
            weights = jnp.exp(logits - new)
            rescale = jnp.exp(largest - new)
            v_j = _slice(v, 2, j, plan.kv_chunk)
            part = _grouped("bkts,bksh->bkth", _kept(plan, fixed, i, j, weights).astype(v.dtype), v_j)
            return new, total * rescale + weights.sum(axis=-1, keepdims=True), o * rescale + part

        # The maximum starts above MASK_VALUE: in a row without allowed keys every exponential is exactly 0.
        shape = (*q_i.shape[:3], 1)
        start = (jnp.full(shape, MASK_VALUE / 2), jnp.zeros(shape), jnp.zeros((*shape[:3], v.shape[-1])))
        largest, total, o = lax.fori_loop(fixed.ranges[i, 0], fixed.ranges[i, 1], step, start)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, MASK_VALUE, largest + jnp.log(total))
        return None, (o / total, lse[..., 0])

    _, (o, lse) = lax.scan(row, None, jnp.arange(fixed.ranges.shape[0]))
    return _joined(o), _joined(lse)


def _joined(rows: Float[Array, "chunks batch heads q_chunk ..."]) -> Float[Array, "batch heads length ..."]:
    rows = jnp.moveaxis(rows, 0, 2)
    return rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])


def _backward(plan: _Plan, trained: tuple, fixed: _Fixed, lse: Array, delta: Array, do: Array):
    q, k, v, table = trained

    def row(carry, i):
        q_i, do_i, lse_i, delta_i = (_slice(array, 2, i, plan.q_chunk) for array in (q, do, lse, delta))

        def step(j, carry):
            dq_i, dk, dv, dtable = carry
            k_j, v_j = (_slice(array, 2, j, plan.kv_chunk) for array in (k, v))
            logits, pull = jax.vjp(lambda q, k, table: _logits(plan, fixed, i, j, q, k, table), q_i, k_j, table)
            weights = jnp.exp(logits - lse_i[..., None])
            values = lambda v: _grouped("bkts,bksh->bkth", _kept(plan, fixed, i, j, weights).astype(v.dtype), v)
            (dv_j,) = jax.vjp(values, v_j)[1](do_i.astype(jnp.float32))
            dweights = _kept(plan, fixed, i, j, _grouped("bkth,bksh->bkts", do_i, v_j))
            dq_part, dk_j, dtable_part = pull(weights * (dweights - delta_i[..., None]))
            add = lambda total, part: lax.dynamic_update_slice_in_dim(
                total, _slice(total, 2, j, plan.kv_chunk) + part, j * plan.kv_chunk, 2
            )
            dtable = None if table is None else dtable + dtable_part
            return dq_i + dq_part, add(dk, dk_j), add(dv, dv_j), dtable

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        dq_i, *carry = lax.fori_loop(fixed.ranges[i, 0], fixed.ranges[i, 1], step, start)
        return tuple(carry), dq_i.astype(q.dtype)

    wide = lambda array: None if array is None else jnp.zeros(array.shape, jnp.float32)
    (dk, dv, dtable), dq = lax.scan(row, (wide(k), wide(v), wide(table)), jnp.arange(fixed.ranges.shape[0]))
    gradients = (_joined(dq), dk, dv, dtable)
    return tuple(None if a is None else g.astype(a.dtype) for g, a in zip(gradients, trained, strict=True))


_attend = differentiable(_forward, _backward)
