"""Tiles cover every row of every group once, in order."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.kernels.grouped_matmul.groups import tiles_of_groups, tiles_of_rows

SIZE, ROWS = 8, 64
GROUP_SIZES = st.lists(st.sampled_from([0, 1, 7, 8, 9, 30]), min_size=5, max_size=5)
"""Their sum may be less than the rows, or more."""


@functools.partial(jax.jit, static_argnums=0, static_argnames=("with_rest", "with_empty"))
def compiled(function, group_sizes, **options):
    return function(group_sizes, ROWS, SIZE, **options)


def covered(tiles, num_groups):
    """Rows by group, in the order of the steps."""
    rows = [[] for _ in range(num_groups)]
    steps = np.stack([tiles.group, tiles.first, tiles.end], axis=1)
    for group, first, end in steps.tolist():
        assert end - first <= SIZE
        rows[group].extend(range(first, end))
    return rows


def expected(group_sizes, with_rest):
    ends = np.minimum(np.cumsum(group_sizes), ROWS).tolist() + [ROWS] * with_rest
    return [list(range(first, end)) for first, end in zip([0, *ends[:-1]], ends, strict=True)]


@pytest.mark.parametrize("with_rest", [False, True])
@given(GROUP_SIZES)
def test_tiles_of_groups(with_rest, group_sizes):
    tiles = compiled(tiles_of_groups, np.array(group_sizes), with_rest=with_rest)
    assert covered(tiles, 5 + with_rest) == expected(group_sizes, with_rest)
    assert tiles.count == np.sum(tiles.first < tiles.end)


@pytest.mark.parametrize(("with_rest", "with_empty"), [(True, False), (False, True)])
@given(GROUP_SIZES)
def test_tiles_of_rows(with_rest, with_empty, group_sizes):
    tiles = compiled(tiles_of_rows, np.array(group_sizes), with_rest=with_rest, with_empty=with_empty)
    tiles = jax.tree.map(np.asarray, tiles)
    assert covered(tiles, 5 + with_rest) == expected(group_sizes, with_rest)
    assert (np.diff(tiles.tile) >= 0).all()  # a tile is left for good, and steps that are not needed move nothing
    held = tiles.first < tiles.end
    assert (tiles.first[held] // SIZE == tiles.tile[held]).all()
    assert ((tiles.end[held] - 1) // SIZE == tiles.tile[held]).all()
    if with_empty:
        assert set(range(5)) <= set(tiles.group.tolist())
