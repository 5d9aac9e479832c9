"""Queries and keys in blocks: which pairs of blocks have work to do, from the mask's rules and the segments."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.padding import pad


class Overlap(NamedTuple):
    """For each pair of a query block and a key block: may any query attend to any key, and may all to all?

    Both are safe bounds: `some` may be true, and `all` false, where a look at every pair would say otherwise.
    """

    some: Bool[Array, "#batch q_blocks kv_blocks"]
    all: Bool[Array, "#batch q_blocks kv_blocks"]


class Tokens(NamedTuple):
    """What the mask needs to know of the queries and keys of a call."""

    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]]
    segment_ids: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]] | None


def consecutive(offset: int, length: int) -> Int[np.ndarray, "1 length"]:
    """Positions known while tracing, so that block ranges of the mask are known too."""
    return offset + np.arange(length, dtype=np.int32)[None]


def padded_tokens(tokens: Tokens, q_block: int, kv_block: int) -> Tokens:
    """The same in whole blocks; what pads the keys becomes segment 0, which is never attended."""
    q_positions, kv_positions = tokens.positions
    segment_ids = tokens.segment_ids
    if segment_ids is None and kv_positions.shape[1] % kv_block:
        segment_ids = tuple(jnp.ones((1, array.shape[1]), jnp.int32) for array in tokens.positions)
    if segment_ids is not None:
        segment_ids = (pad(segment_ids[0], 1, q_block), pad(segment_ids[1], 1, kv_block))
    return Tokens((pad(q_positions, 1, q_block, "edge"), pad(kv_positions, 1, kv_block, "edge")), segment_ids)


def overlap_of_mask(mask: MaskSpec, tokens: Tokens, q_block: int, kv_block: int) -> Overlap:
    """What the mask's rules leave, from the lowest and highest position of each block."""
    (q_low, q_high), (kv_low, kv_high) = _extremes(tokens.positions, q_block, kv_block)
    nearest, farthest = q_low - kv_high, q_high - kv_low
    some, every = [farthest == farthest], [farthest == farthest]
    before, after = mask.window
    if mask.causal:
        prefix = 0 if mask.prefix is None else mask.prefix
        some.append((farthest >= 0) | (kv_low < prefix))
        every.append((nearest >= 0) | (kv_high < prefix))
    if before is not None:
        some.append(nearest <= before)
        every.append(farthest <= before)
    if after is not None:
        some.append(farthest >= -after)
        every.append(nearest >= -after)
    if mask.chunk is not None:
        q_first, q_last, kv_first, kv_last = (end // mask.chunk for end in (q_low, q_high, kv_low, kv_high))
        some.append((q_first <= kv_last) & (kv_first <= q_last))
        every.append((q_first == q_last) & (kv_first == kv_last) & (q_first == kv_first))
    return Overlap(_both(some), _both(every))


def overlap_of_segments(segment_ids: tuple[Array, Array], q_block: int, kv_block: int) -> Overlap:
    """Where a segment other than padding lies in both blocks; exact where segments come in rising order."""
    (q_low, q_high), (kv_low, kv_high) = _extremes(segment_ids, q_block, kv_block)
    none = jnp.iinfo(jnp.int32).max
    real = tuple(jnp.where(ids == 0, none, ids) for ids in segment_ids)
    (q_first, _), (kv_first, _) = _extremes(real, q_block, kv_block)
    some = (q_first <= kv_high) & (kv_first <= q_high)
    return Overlap(some, (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low) & (q_low != 0))


class Ranges(NamedTuple):
    """The key blocks of each query block.

    Attributes:
      table: (first, end, full_first, full_end): blocks from first to end have work, and those from full_first to
        full_end need no mask.
      width: the most blocks of any range, as far as known while tracing.
    """

    table: Int[Array, "#batch q_blocks 4"]
    width: int


def block_ranges(mask: MaskSpec, tokens: Tokens, q_block: int, kv_block: int) -> Ranges:
    overlap = overlap_of_mask(mask, tokens, q_block, kv_block)
    width = overlap.some.shape[2]
    if isinstance(overlap.some, np.ndarray):
        first, end = range_of(overlap.some)
        width = max(1, int((end - first).max()))
    if tokens.segment_ids is not None:
        segments = overlap_of_segments(tokens.segment_ids, q_block, kv_block)
        overlap = Overlap(overlap.some & segments.some, overlap.all & segments.all)
    full_first, full_end = run_of(overlap.all)
    table = jnp.stack([*range_of(overlap.some), full_first, full_end], axis=-1).astype(jnp.int32)
    return Ranges(table, width)


def merge_batch(ranges: Ranges) -> Int[Array, "q_blocks 2"]:
    """(first, end) for the whole batch at once."""
    first, end = ranges.table[..., 0], ranges.table[..., 1]
    first = jnp.where(first < end, first, ranges.width).min(axis=0)
    return jnp.stack([first, end.max(axis=0)], axis=-1)


def _extremes(pair: tuple[Array, Array], q_block: int, kv_block: int):
    """Lowest and highest entry of each block, those of queries and of keys shaped to broadcast."""
    q, kv = (array.reshape(array.shape[0], -1, block) for array, block in zip(pair, (q_block, kv_block), strict=True))
    q, kv = q[:, :, None], kv[:, None]
    return (q.min(-1), q.max(-1)), (kv.min(-1), kv.max(-1))


def _both(conditions: list[Array]) -> Array:
    result = conditions[0]
    for condition in conditions[1:]:
        result = result & condition
    return result


def range_of(some: Bool[Array, "... blocks"]) -> tuple[Array, Array]:
    """First and end of the smallest range with all that is true; (0, 0) if nothing is."""
    end = some.shape[-1] - some[..., ::-1].argmax(-1)
    return some.argmax(-1), end * some.any(-1)


def run_of(every: Bool[Array, "... blocks"]) -> tuple[Array, Array]:
    """First and end of the first run of true entries; an empty one if there are none."""
    xp = np if isinstance(every, np.ndarray) else jnp
    first = every.argmax(-1)
    broken = ~every & (np.arange(every.shape[-1]) > first[..., None])
    end = xp.where(broken.any(-1), broken.argmax(-1), every.shape[-1])
    return first, xp.where(every.any(-1), end, first)
