"""Context parallelism: attention where the axis `sequence` of the mesh splits the length of queries and keys.

    all_gather  every device gathers all keys and values and attends with its own queries
    ulysses     an all-to-all gives every device all tokens of its share of the heads (Jacobs et al. 2023)
    ring        keys and values travel round (see ring.py); no device ever has them all
    halo        where a sliding window reaches no farther than the neighbour, only the keys within it are exchanged

Nothing here knows of batch or heads: other axes have taken their share before.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from t5x_like.kernels.attention.attention import attend
from t5x_like.kernels.attention.call import AttentionCall, Side
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.sharding.logical import constrain, length_shards
from t5x_like.sharding.placement import current
from t5x_like.sharding.ring import Result, Ring, ring_attention
from t5x_like.sharding.token_runs import AXIS, from_zigzag, pieces, to_zigzag

_in_zigzag = jax.make_user_context(False)


@contextlib.contextmanager
def balanced(batch: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Gives the batch with its decoder's tokens in zigzag order, if the configuration asks for it.

    Run the model within: attention with a causal mask then knows the order, and the added `decoder_positions` tell
    everything else. A loss that sums over tokens needs no more; what picks tokens by their place, or drops at random,
    must not run on it.

    Args:
      batch: features; those named `decoder_...` are [batch, length, ...].
    """
    config, count = current().context, length_shards()
    tokens = batch.get("decoder_input_tokens")
    wanted = tokens is not None and count > 1 and config.balance and config.method != "ulysses"
    if not wanted or tokens.shape[1] % (2 * count):
        yield batch
        return
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    features = {"decoder_positions": positions} | batch
    reordered = lambda array: constrain(to_zigzag(array, count), "batch", "length", *(None,) * (array.ndim - 2))
    with _in_zigzag(True):
        yield {name: reordered(array) if name.startswith("decoder_") else array for name, array in features.items()}


def lies_in_zigzag(mask: MaskSpec) -> bool:
    """Whether the tokens of a call with this mask are in zigzag order: those of the decoder, whose mask is causal."""
    return _in_zigzag.value and mask.causal


def places(length: int, mask: MaskSpec) -> Int[Array, "1 length"]:
    """The place in the row of each token of a call with this mask, as the tokens lie."""
    places = jnp.arange(length, dtype=jnp.int32)[None]
    return to_zigzag(places, length_shards()) if lies_in_zigzag(mask) else places


def attend_to_all(call: AttentionCall, count: int, *, pipelined: bool) -> Result:
    """Attention of this device's queries to the keys of all devices; inside `jax.shard_map`.

    Args:
      call: of this device's queries and keys; a position that is a number is that of the first of all. What belongs
        to heads is, with `ulysses`, of this device's share of them.
      count: devices that share the length.
      pipelined: whether this runs in a stage of a pipeline. Then nothing is sent from neighbour to neighbour: XLA
        counts the devices of all stages in, and those of a stage that waits would be missed for ever.
    """
    method = current().context.method
    in_zigzag = lies_in_zigzag(call.mask)
    if method == "ulysses":
        return _ulysses(call)
    window = _halo_window(call, in_zigzag)
    if window is not None and not pipelined:
        return _halo(call, count, in_zigzag, window)
    if method == "ring":
        return ring_attention(Ring(count, in_zigzag), call)
    # The backward pass gathers keys and values again rather than keep them whole.
    again = jax.checkpoint(
        functools.partial(_all_gather, count, in_zigzag),
        policy=jax.checkpoint_policies.save_only_these_names("attention"),
    )
    return again(call)


@jax.custom_vjp
def _gather(array: Shaped[Array, "batch length ..."]) -> Shaped[Array, "batch all_length ..."]:
    """All devices' shares of the length; gradients are summed in float32."""
    return lax.all_gather(array, AXIS, axis=1, tiled=True)


def _gather_backward(_, gradient):
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    return (lax.psum_scatter(wide, AXIS, scatter_dimension=1, tiled=True).astype(gradient.dtype),)


_gather.defvjp(lambda array: (_gather(array), None), _gather_backward)


def _all_gather(count: int, in_zigzag: bool, call: AttentionCall) -> Result:
    keys = call.keys.map(_gather)
    if in_zigzag and keys.consecutive:
        keys = keys.map(lambda a: from_zigzag(a, count))
    runs = pieces(call.queries, lax.axis_index(AXIS), count, in_zigzag)
    return _joined([attend(call.between(run, keys)) for run in runs])


def _joined(results: list[Result]) -> Result:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results)


def _ulysses(call: AttentionCall) -> Result:
    swap = lambda a, split, join: lax.all_to_all(a, AXIS, split, join, tiled=True)

    def all_tokens(side: Side) -> Side:
        arrays = tuple(swap(a, 2, 1) for a in side.arrays)
        return side._replace(arrays=()).map(_gather)._replace(arrays=arrays)

    o, lse = attend(call.between(all_tokens(call.queries), all_tokens(call.keys)))
    return swap(o, 1, 2), swap(lse, 1, 2)


def _halo_window(call: AttentionCall, in_zigzag: bool) -> tuple[int, int] | None:
    """How many keys before and after a piece its queries may see; None if that may be more than the next piece has."""
    mask, offsets, length = call.mask, call.known_offsets, call.keys.length
    if offsets is None or offsets[0] != offsets[1] or call.queries.length != length:
        return None
    within_chunk = [] if mask.chunk is None else [mask.chunk - 1]
    before, after = mask.window
    before = min([*within_chunk, *([] if before is None else [before])], default=None)
    after = min([*within_chunk, *([] if after is None else [after])], default=None)
    if mask.causal and mask.prefix is None:
        after = 0
    size = length // (2 if in_zigzag else 1)
    return None if before is None or after is None or max(before, after) > size else (before, after)


def _halo(call: AttentionCall, count: int, in_zigzag: bool, window: tuple[int, int]) -> Result:
    index = lax.axis_index(AXIS)
    q_pieces, kv_pieces = (pieces(side, index, count, in_zigzag) for side in (call.queries, call.keys))
    if call.segment_ids is None:  # they mark what lies before the row's beginning or after its end as padding
        ones = lambda side: side._replace(segment_ids=jnp.ones(side.arrays[0].shape[:2], jnp.int32))
        q_pieces, kv_pieces = map(ones, q_pieces), [ones(piece) for piece in kv_pieces]
    before, after = window
    size = kv_pieces[0].length
    tails = [piece.map(lambda a: a[:, size - before :]) for piece in kv_pieces]
    heads_of_next = [piece.map(lambda a: a[:, :after]) for piece in kv_pieces]
    previous, following = _neighbours(tails, heads_of_next, index, count)
    results = []
    for run, left, own, right in zip(q_pieces, previous, kv_pieces, following, strict=True):
        parts = [part for part, width in ((left, before), (own, size), (right, after)) if width]
        arrays, ids = (
            jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *(part[i] for part in parts)) for i in (0, 2)
        )
        results.append(attend(call.between(run, Side(arrays, own.positions - before, ids))))
    return _joined(results)


def _neighbours(tails: list[Side], firsts: list[Side], index: Int[Array, ""], count: int):
    """For each piece the tail of the one before it and the beginning of the one after; segment 0 where there is none.

    In zigzag order device r has the chunks r and 2 * count - 1 - r: the neighbours of the latter lie the other way
    round, and the last device has both of the middle ones.
    """
    up, down = (functools.partial(_shift, index=index, count=count, by=by) for by in (1, -1))
    if len(tails) == 1:
        return [up(tails[0])], [down(firsts[0])]
    last = index == count - 1
    own_if_last = lambda own, other: jax.tree.map(lambda a, b: jnp.where(last, a, b), own, other)
    previous = [up(tails[0]), own_if_last(tails[0], down(tails[1]))]
    following = [own_if_last(firsts[1], down(firsts[0])), up(firsts[1])]
    return previous, following


def _shift(side: Side, *, index: Int[Array, ""], count: int, by: int) -> Side:
    """What device index - by has; zeros, so segment 0, where there is no such device."""
    hops = [(i, i + by) for i in range(count) if 0 <= i + by < count]
    return side.map(lambda a: lax.ppermute(a, AXIS, hops))
