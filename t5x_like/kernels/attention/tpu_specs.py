"""Which blocks of its arrays a grid step of a TPU kernel gets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.block_sizes import BlockSizes

SUBLANES = 8


class Scalars(NamedTuple):
    """What is in scalar memory before a kernel starts.

    Attributes:
      ranges: `blocks.Ranges.table`, flat.
      offsets: first positions of queries and keys, and the first block of the part of the keys that is worked on.
    """

    ranges: Int[Any, "batch_q_blocks_4"]
    offsets: Int[Any, "3"]


class Context(NamedTuple):
    """What a kernel reads besides queries, keys and values; None where the call does not need it.

    Attributes:
      q_rows: positions and segments of the queries, as the first two of 8 rows.
      kv_rows: of the keys.
      strip: the relative bias of a head at each query position minus key position, from -reach to reach - 1.
      slopes: of ALiBi.
    """

    q_rows: Int[Any, "#batch 8 q_length"] | None
    kv_rows: Int[Any, "#batch 8 kv_length"] | None
    strip: Float[Any, "heads 1 two_reach"] | None
    slopes: Float[Any, "heads"] | None


class Place(NamedTuple):
    """Where a grid step is: row of the batch, key head, query head, query block and key block."""

    batch: Any
    kv_head: Any
    head: Any
    q_block: Any
    kv_block: Any


@dataclass(frozen=True)
class Specs:
    """Block specs for a kernel.

    Attributes:
      sizes: of the blocks.
      place: from grid indices and scalar references to a `Place`.
    """

    sizes: BlockSizes
    place: Callable[..., Place]

    def _spec(self, shape: tuple[int | None, ...], index: Callable[[Place], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: index(self.place(*grid)))

    def queries(self, dim: int) -> pl.BlockSpec:
        return self._spec((None, None, self.sizes.q, dim), lambda at: (at.batch, at.head, at.q_block, 0))

    def keys(self, dim: int) -> pl.BlockSpec:
        return self._spec((None, None, self.sizes.kv, dim), lambda at: (at.batch, at.kv_head, at.kv_block, 0))

    def per_query(self) -> pl.BlockSpec:
        """One number per query, as [batch heads 1 q_length]."""
        return self._spec((None, None, 1, self.sizes.q), lambda at: (at.batch, at.head, 0, at.q_block))

    def all_keys(self, length: int, dim: int) -> pl.BlockSpec:
        return self._spec((None, None, length, dim), lambda at: (at.batch, at.kv_head, 0, 0))

    def strips(self, length: int) -> pl.BlockSpec:
        return self._spec((None, None, 1, length), lambda at: (at.batch, at.head, 0, 0))

    def context(self, context: Context) -> Context:
        # What is the same for all rows of the batch has one row.
        row = lambda array, at: at.batch if array.shape[0] > 1 else 0
        rows = lambda array, size, block: (
            array is not None and self._spec((None, SUBLANES, size), lambda at: (row(array, at), 0, block(at)))
        )
        strip, slopes = context.strip, context.slopes
        return Context(
            q_rows=rows(context.q_rows, self.sizes.q, lambda at: at.q_block) or None,
            kv_rows=rows(context.kv_rows, self.sizes.kv, lambda at: at.kv_block) or None,
            strip=None if strip is None else self._spec((None, 1, strip.shape[2]), lambda at: (at.head, 0, 0)),
            slopes=None if slopes is None else pl.BlockSpec(memory_space=pltpu.SMEM),
        )


def read_range(ranges, batch, i, num_q_blocks: int) -> tuple[Array, Array, Array, Array]:
    """(first, end, full_first, full_end) of a query block, from `Scalars.ranges`."""
    shared = ranges.shape[0] == num_q_blocks * 4
    row = i if shared else batch * num_q_blocks + i
    return tuple(ranges[row * 4 + field] for field in range(4))
