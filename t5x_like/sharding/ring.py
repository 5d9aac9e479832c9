"""Ring attention (Liu et al. 2023): keys and values travel from device to device, queries stay.

Of n devices each attends to its own keys first and passes them on; after n - 1 hops it has seen all. Partial results
are merged by their log-sum-exp in float32. The backward pass sends keys and values round again, together with the
float32 sums of their gradients, so that no device ever holds more than two shares of them. It computes each partial
result once more, for its gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.attention import attend
from t5x_like.kernels.attention.call import AttentionCall, Side
from t5x_like.kernels.attention.logits import MASK_VALUE
from t5x_like.sharding.token_runs import AXIS, may_attend, pieces

Result = tuple[Float[Array, "batch length heads v_dim"], Float[Array, "batch length heads"]]
"""Output and log-sum-exp, both float32."""


class Ring(NamedTuple):
    """The number of devices, and whether tokens lie in zigzag order."""

    count: int
    in_zigzag: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(ring: Ring, call: AttentionCall) -> Result:
    """Attention of this device's queries to the keys of all; inside `jax.shard_map`."""
    return _forward(ring, call)[0]


def _forward(ring: Ring, call: AttentionCall):
    shape = (*call.q.shape[:3], call.v.shape[3])
    result = (jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], MASK_VALUE, jnp.float32))

    def step(carry, i):
        keys, result = carry
        # Both leave the barrier together: so the scheduler cannot put the transfer after the computation.
        return lax.optimization_barrier((_send(keys, ring), _visit(ring, i, call, keys, result))), None

    (keys_last, result), _ = lax.scan(step, (call.keys, result), jnp.arange(ring.count - 1))
    o, lse = _visit(ring, ring.count - 1, call, keys_last, result)
    o, lse = checkpoint_name(o.astype(call.q.dtype), "attention"), checkpoint_name(lse, "attention")
    return (o, lse), (call, o, lse)


def _backward(ring: Ring, saved, gradient: Result):
    call, o, lse = saved
    do, dlse = gradient
    do = do.astype(jnp.float32)
    delta = jnp.sum(o.astype(jnp.float32) * do, axis=-1) - dlse
    wide = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)
    visit = functools.partial(_visit_backward, ring, call, outer=(do, lse, delta))

    def step(carry, i):
        keys, dkeys, mine = carry
        # The sums for these keys arrive from where they were last, while this device computes what it adds to them.
        sent = _send((keys, dkeys), ring)
        (next_keys, arrived), (added, mine) = lax.optimization_barrier((sent, visit(i, keys=keys, mine=mine)))
        return (next_keys, _plus(arrived, added), mine), None

    start = (call.keys, wide(call.keys.arrays), wide((call.q, call.table)))
    (last, dkeys, mine), _ = lax.scan(step, start, jnp.arange(ring.count - 1))
    arrived, (added, mine) = lax.optimization_barrier(
        (_send(dkeys, ring), visit(jnp.int32(ring.count - 1), keys=last, mine=mine))
    )
    dkeys = _send(_plus(arrived, added), ring)
    sums = {"q": mine[0], "k": dkeys[0], "v": dkeys[1], "table": mine[1]}
    narrow = {name: None if a is None else a.astype(getattr(call, name).dtype) for name, a in sums.items()}
    return (call.replace(**narrow, positions=None, segment_ids=None, alibi_slopes=None),)


ring_attention.defvjp(_forward, _backward)


def _send(tree, ring: Ring):
    """What the device before had; positions that are a number are everyone's and stay."""
    hop = [(i, (i + 1) % ring.count) for i in range(ring.count)]
    return jax.tree.map(lambda a: a if jnp.ndim(a) == 0 else lax.ppermute(a, AXIS, hop), tree)


def _plus(a, b):
    return jax.tree.map(jnp.add, a, b)


def _cut(arrays: tuple[Array, ...], rows: slice) -> tuple[Array, ...]:
    return jax.tree.map(lambda a: a[:, rows], arrays)


def _put(arrays: tuple[Array, ...], rows: slice, new: tuple[Array, ...]) -> tuple[Array, ...]:
    return jax.tree.map(lambda a, b: a.at[:, rows].set(b), arrays, new)


def _pairs(ring: Ring, i: Int[Array, ""], call: AttentionCall, keys: Side):
    """(slice of the queries, slice of the keys, call between them) for all pieces that meet at step i."""
    index = lax.axis_index(AXIS)
    q_pieces = pieces(call.queries, index, ring.count, ring.in_zigzag)
    kv_pieces = pieces(keys, (index - i) % ring.count, ring.count, ring.in_zigzag)
    for row, q_piece in enumerate(q_pieces):
        for column, kv_piece in enumerate(kv_pieces):
            rows = slice(row * q_piece.length, (row + 1) * q_piece.length)
            columns = slice(column * kv_piece.length, (column + 1) * kv_piece.length)
            yield rows, columns, call.between(q_piece, kv_piece)


def _unless_empty(piece: AttentionCall, compute, otherwise):
    wanted = may_attend(piece)
    return compute(otherwise) if wanted is None else lax.cond(wanted, compute, lambda x: x, otherwise)


def _visit(ring: Ring, i: Int[Array, ""], call: AttentionCall, keys: Side, result: Result) -> Result:
    """Merges the attention to the keys that are here at step i into `result`."""
    for rows, _, piece in _pairs(ring, i, call, keys):

        def compute(result, piece=piece):
            o, lse = result
            o_new, lse_new = attend(piece)
            total = jnp.logaddexp(lse, lse_new)
            weigh = lambda o, lse: o.astype(jnp.float32) * jnp.exp(lse - total)[..., None]
            return weigh(o, lse) + weigh(o_new, lse_new), total

        part = _unless_empty(piece, compute, _cut(result, rows))
        result = _put(result, rows, part)
    return result


def _visit_backward(ring: Ring, call: AttentionCall, i: Int[Array, ""], *, keys: Side, outer, mine):
    """The gradients that come from the keys here at step i: of these keys, and `mine` with those of queries and table.

    With the weight w = exp(lse_i - lse) of the partial result (o_i, lse_i) in the whole, the gradient of o_i is w * do
    and that of lse_i is w * (sum(do * o_i) - delta), where delta is sum(do * o) less the gradient of lse.
    """
    dkeys = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), keys.arrays)
    for rows, columns, piece in _pairs(ring, i, call, keys):
        do, lse, delta = _cut(outer, rows)

        def compute(sums, piece=piece, do=do, lse=lse, delta=delta):
            run = lambda q, kv, table: attend(piece.replace(q=q, k=kv[0], v=kv[1], table=table))
            (o_i, lse_i), pull = jax.vjp(run, piece.q, (piece.k, piece.v), piece.table)
            weight = jnp.exp(lse_i - lse)
            do_i = weight[..., None] * do
            dlse_i = jnp.sum(do_i * o_i.astype(jnp.float32), axis=-1) - weight * delta
            return _plus(sums, pull((do_i.astype(o_i.dtype), dlse_i)))

        dq, dtable = mine
        sums = (_cut(dq, rows), _cut(dkeys, columns), dtable)
        new_dq, new_dkeys, dtable = _unless_empty(piece, compute, sums)
        mine = (_put(dq, rows, new_dq), dtable)
        dkeys = _put(dkeys, columns, new_dkeys)
    return dkeys, mine
