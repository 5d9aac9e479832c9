"""What the Triton kernels share: which blocks a program visits, and the logits of a tile of scores.

A head_dim is worked on in parts whose sizes are powers of two, as Triton's arrays must have: 192 is 128 + 64.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from t5x_like.kernels.attention.biases import alibi
from t5x_like.kernels.attention.blocks import (
    Overlap,
    Tokens,
    overlap_of_mask,
    overlap_of_segments,
    range_of,
    run_of,
)
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks
from t5x_like.kernels.attention.logits import attention_logits
from t5x_like.kernels.attention.masks import MaskSpec, position_rules, segment_rules
from t5x_like.kernels.attention.prepared import Plan


class Side(NamedTuple):
    """What the mask needs to know of queries or of keys; None where the call does not need it."""

    positions: Int[Any, "#batch length"] | None
    segments: Int[Any, "#batch length"] | None


class Context(NamedTuple):
    """What a kernel reads besides queries, keys and values; None where the call does not need it.

    Attributes:
      visits: of each of its blocks, see `Visits`.
      offsets: first positions of queries and keys.
      strip: the relative bias of each head at key position minus query position from -reach to reach.
      slopes: of ALiBi.
    """

    visits: Int[Any, "#batch blocks 6"]
    offsets: Int[Any, "2"]
    queries: Side | None = None
    keys: Side | None = None
    strip: Float[Any, "heads two_reach_and_one"] | None = None
    slopes: Float[Any, "heads"] | None = None


class Visits(NamedTuple):
    """Which blocks of the other side a block has work with, as six numbers.

    From `first` to `end`; but from `plain_first` to `plain_end`, and from `late_first` to `late_end`, no score needs
    the mask, and all of a block have the same relative bias.
    """

    first: Any
    end: Any
    plain_first: Any
    plain_end: Any
    late_first: Any
    late_end: Any

    @property
    def num_plain(self) -> Int[Array, ""]:
        return self.plain_end - self.plain_first + self.late_end - self.late_first

    @property
    def num_others(self) -> Int[Array, ""]:
        return self.end - self.first - self.num_plain

    def plain(self, n: Array) -> Int[Array, ""]:
        """The n-th plain block."""
        late = n - (self.plain_end - self.plain_first)
        return jnp.where(late < 0, self.plain_first + n, self.late_first + late)

    def other(self, n: Array) -> Int[Array, ""]:
        """The n-th of those that are not plain."""
        block = self.first + n
        block += jnp.where(block >= self.plain_first, self.plain_end - self.plain_first, 0)
        return block + jnp.where(block >= self.late_first, self.late_end - self.late_first, 0)


def make_visits(
    plan: Plan, tokens: Tokens, blocks: GpuBlocks
) -> tuple[Int[Array, "#batch q_blocks 6"], Int[Array, "#batch kv_blocks 6"]]:
    """`Visits` for each query block, in key blocks, and for each key block, in query blocks."""
    overlap = overlap_of_mask(plan.mask, tokens, blocks.q, blocks.kv)
    if tokens.segment_ids is not None:
        segments = overlap_of_segments(tokens.segment_ids, blocks.q, blocks.kv)
        overlap = Overlap(overlap.some & segments.some, overlap.all & segments.all)
    near = overlap.some & False
    if plan.relative_bias is not None:
        window = MaskSpec(window=(plan.reach - 1, plan.reach - 1))
        near = overlap_of_mask(window, tokens, blocks.q, blocks.kv).some
    by_query = (overlap.some, overlap.all, near)
    return _visits(*by_query), _visits(*(array.swapaxes(1, 2) for array in by_query))


def _visits(
    some: Bool[Array, "#batch x y"], every: Bool[Array, "#batch x y"], near: Bool[Array, "#batch x y"]
) -> Int[Array, "#batch x 6"]:
    first, end = range_of(some)
    near_first, near_end = range_of(near)
    index = np.arange(some.shape[2])
    early = run_of(every & (index < near_first[..., None]))
    late = run_of(every & (index >= near_end[..., None]))
    columns = (first, end, *early, *late)
    xp = np if all(isinstance(column, np.ndarray) for column in columns) else jnp  # what is known stays known
    return jnp.asarray(xp.stack(xp.broadcast_arrays(*columns), axis=-1), jnp.int32)


def parts(dim: int) -> list[slice]:
    """`dim`, a multiple of 16, as powers of two, the largest first."""
    sizes = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def load(ref: Any, rows: Any, *index: Any) -> list[Array]:
    """Rows of a block, in parts."""
    return [ref[rows, *index, part] for part in parts(ref.shape[-1])]


def dot(a: Array, b: Array) -> Float[Array, "x y"]:
    """Matrix product with float32 out; float32 in is multiplied as such."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def products(a: list[Array], b: list[Array]) -> Float[Array, "x y"]:
    """Rows of `a` times rows of `b`, both in parts."""
    total = dot(a[0], b[0].T)
    for left, right in zip(a[1:], b[1:], strict=True):
        total += dot(left, right.T)
    return total


class Tile(NamedTuple):
    """Where a tile of scores is. What belongs to queries and what belongs to keys broadcast against each other.

    Attributes:
      head: of the queries.
      ahead: position of the first query less that of the first key; only its sign matters, far from 0.
    """

    head: Any
    q_positions: Int[Array, "..."]
    kv_positions: Int[Array, "..."]
    q_segments: Int[Array, "..."] | None
    kv_segments: Int[Array, "..."] | None
    ahead: Int[Array, ""]


def make_tile(
    plan: Plan, blocks: GpuBlocks, context: Context, head: Array, i: Array, j: Array, queries_are_rows: bool
) -> Tile:
    """The tile of query block i and key block j."""
    starts = (context.offsets[0] + i * blocks.q, context.offsets[1] + j * blocks.kv)
    numbers = []
    for side, size, block, start in zip(
        (context.queries, context.keys), (blocks.q, blocks.kv), (i, j), starts, strict=True
    ):
        is_row = queries_are_rows == (len(numbers) == 0)
        shaped = lambda array, is_row=is_row: array[:, None] if is_row else array[None, :]
        rows = pl.ds(block * size, size)
        positions = side.positions[rows] if plan.given_positions else start + jnp.arange(size, dtype=jnp.int32)
        segments = None if side.segments is None else shaped(side.segments[rows])
        numbers.append((shaped(positions), segments))
    (q_positions, q_segments), (kv_positions, kv_segments) = numbers
    return Tile(head, q_positions, kv_positions, q_segments, kv_segments, starts[0] - starts[1])


def tile_logits(
    plan: Plan, context: Context, tile: Tile, scores: Float[Array, "x y"], plain: bool
) -> Float[Array, "x y"]:
    """Logits from the products of queries and keys; `plain` as in `Visits`."""
    bias = None
    if plan.relative_bias is not None:
        bias = _far_bias(plan, context, tile) if plain else _near_bias(plan, context, tile)
    if context.slopes is not None:
        linear = alibi(context.slopes[tile.head], tile.kv_positions - tile.q_positions)
        bias = linear if bias is None else bias + linear
    mask = None if plain else _mask(plan, tile, scores.shape)
    return attention_logits(scores, mask, bias, scale=plan.scale, soft_cap=plan.soft_cap)


def _far_bias(plan: Plan, context: Context, tile: Tile) -> Float[Array, ""]:
    return context.strip[tile.head, jnp.where(tile.ahead > 0, 0, 2 * plan.reach)]


def _near_bias(plan: Plan, context: Context, tile: Tile) -> Float[Array, "x y"]:
    index = jnp.clip(tile.kv_positions - tile.q_positions, -plan.reach, plan.reach) + plan.reach
    return plt.load(context.strip.at[tile.head, index])


def _mask(plan: Plan, tile: Tile, shape: tuple[int, int]) -> Bool[Array, "x y"] | None:
    rules = position_rules(plan.mask, tile.q_positions, tile.kv_positions)
    if tile.q_segments is not None:
        rules += segment_rules(tile.q_segments, tile.kv_segments)
    if not rules:
        return None
    result = jnp.broadcast_to(rules[0], shape)
    for rule in rules[1:]:
        result &= rule
    return result


def zeros(rows: int, dim: int) -> list[Float[Array, "rows part"]]:
    return [jnp.zeros((rows, part.stop - part.start), jnp.float32) for part in parts(dim)]


def visit_all(visits: Visits, step: Any, carry: Any) -> Any:
    """Calls step(carry, block, plain) for every block with work."""
    others = lambda n, carry: step(carry, visits.other(n), False)
    plain = lambda n, carry: step(carry, visits.plain(n), True)
    carry = lax.fori_loop(0, visits.num_others, others, carry)
    return lax.fori_loop(0, visits.num_plain, plain, carry)
