"""Groups of rows, cut into the tiles that kernels work on; everything is worked out before a kernel starts."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Tiles(NamedTuple):
    """Steps of work, in the order of the rows; what is not needed of them is empty and repeats the last one.

    Attributes:
      group: that the step belongs to; the number of groups itself for rows that belong to none.
      tile: number of the tile of rows, where tiles lie at multiples of their size.
      first: first row of the step.
      end: the row after its last one; `first` where the step is empty.
      count: steps that are needed.
    """

    group: Int[Array, "steps"]
    tile: Int[Array, "steps"]
    first: Int[Array, "steps"]
    end: Int[Array, "steps"]
    count: Int[Array, ""]


def tiles_of_groups(group_sizes: Int[Array, "g"], num_rows: int, size: int, *, with_rest: bool) -> Tiles:
    """Tiles that begin where their group begins, so that no two steps share a row.

    `with_rest`: the rows after the last group count as one more group.
    """
    first, end = _rows(group_sizes, num_rows, with_rest)
    group, within, count, needed = _steps(-(-(end - first) // size), num_rows // size + len(first))
    start = first[group] + within * size
    stop = jnp.where(needed, jnp.minimum(start + size, end[group]), start)
    return Tiles(group, start // size, start, stop, count)


def tiles_of_rows(
    group_sizes: Int[Array, "g"], num_rows: int, size: int, *, with_rest: bool, with_empty: bool
) -> Tiles:
    """Tiles at multiples of `size`, which divides `num_rows`: one that several groups share is a step for each.

    `with_rest`: the rows after the last group count as one more group. `with_empty`: an empty group has an empty step.
    """
    first, end = _rows(group_sizes, num_rows, with_rest)
    first_tile = jnp.minimum(first // size, num_rows // size - 1)
    tiles = jnp.where(first < end, -(-end // size) - first_tile, int(with_empty))
    group, within, count, needed = _steps(tiles, num_rows // size + len(group_sizes))
    tile = first_tile[group] + within
    start = jnp.maximum(first[group], tile * size)
    stop = jnp.where(needed, jnp.minimum(end[group], (tile + 1) * size), start)
    return Tiles(group, tile, start, stop, count)


def _rows(group_sizes, num_rows: int, with_rest: bool) -> tuple[Int[Array, "groups"], Int[Array, "groups"]]:
    """First row of each group, and the row after its last one."""
    end = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), num_rows)
    if with_rest:
        end = jnp.append(end, num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]]), end


def _steps(counts: Int[Array, "groups"], length: int):
    """`length` steps, of which each group in turn has so many: group, number within it, how many, which are needed."""
    ends = jnp.cumsum(counts)
    step = jnp.arange(length)
    needed = step < ends[-1]
    step = jnp.clip(step, 0, jnp.maximum(ends[-1] - 1, 0))
    # A comparison of all with all: `jnp.searchsorted` refuses arrays that vary over a mesh (JAX 0.10.2).
    group = jnp.sum(step[:, None] >= ends, axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, len(counts) - 1)
    return group, step - (ends - counts)[group], ends[-1], needed


def count_rows(group_sizes: Int[Array, "g"], num_rows: int) -> Int[Array, ""]:
    """Rows that belong to a group."""
    return jnp.minimum(group_sizes.sum(), num_rows)
