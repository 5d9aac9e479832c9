"""Grouped products in plain JAX: XLA's own, and one whose work does not grow with the number of groups."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from t5x_like.kernels.dot import dot
from t5x_like.kernels.grouped_matmul.groups import count_rows, tiles_of_groups
from t5x_like.kernels.grouped_matmul.products import Products
from t5x_like.kernels.varying import zeros_varying_like

CHUNK_ROWS = 64
"""Rows that `chunked` multiplies at once."""


def reference(
    lhs: Float[Array, "m k"], rhs: Float[Array, "g k n"], group_sizes: Int[Array, "g"]
) -> Float[Array, "m n"]:
    """`jax.lax.ragged_dot`, with its own derivatives."""
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    out = lax.ragged_dot(lhs, rhs, group_sizes, precision=precision, preferred_element_type=jnp.float32)
    present = jnp.arange(len(lhs)) < count_rows(group_sizes, len(lhs))
    return jnp.where(present[:, None], out, 0).astype(lhs.dtype)


def _product(rows: Float[Array, "m a"], rhs: Float[Array, "g k n"], group_sizes, contract: int) -> Float[Array, "m b"]:
    """Rows times the matrices of their groups, over dim `contract` of a matrix.

    The tiles come in order of their rows, so what one writes beyond the end of its group, the next ones overwrite.
    """
    tiles = tiles_of_groups(group_sizes, len(rows), CHUNK_ROWS, with_rest=False)
    padded = _pad(rows)

    def step(i, out):
        tile = lax.dynamic_slice_in_dim(padded, tiles.first[i], CHUNK_ROWS)
        product = dot(tile, rhs[tiles.group[i]], (1, contract)).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, product, tiles.first[i], axis=0)

    out = zeros_varying_like((len(padded), rhs.shape[2 - contract]), rows.dtype, (rows, rhs, group_sizes))
    out = lax.fori_loop(0, tiles.count, step, out)[: len(rows)]
    present = jnp.arange(len(rows)) < count_rows(group_sizes, len(rows))
    return jnp.where(present[:, None], out, 0)


def _forward(plan: None, lhs, rhs, group_sizes):
    return _product(lhs, rhs, group_sizes, contract=0)


def _dlhs(plan: None, dout, rhs, group_sizes):
    return _product(dout, rhs, group_sizes, contract=1)


def _drhs(plan: None, lhs: Float[Array, "m k"], dout: Float[Array, "m n"], group_sizes) -> Float[Array, "g k n"]:
    tiles = tiles_of_groups(group_sizes, len(lhs), CHUNK_ROWS, with_rest=False)
    padded = _pad(lhs), _pad(dout)

    def step(i, sums):
        inside = (tiles.first[i] + jnp.arange(CHUNK_ROWS) < tiles.end[i])[:, None]
        rows = (lax.dynamic_slice_in_dim(array, tiles.first[i], CHUNK_ROWS) for array in padded)
        lhs_tile, dout_tile = (jnp.where(inside, tile, 0) for tile in rows)
        return sums.at[tiles.group[i]].add(dot(lhs_tile, dout_tile, (0, 0)))

    shape = (len(group_sizes), lhs.shape[1], dout.shape[1])
    sums = zeros_varying_like(shape, jnp.float32, (lhs, dout, group_sizes))
    return lax.fori_loop(0, tiles.count, step, sums).astype(lhs.dtype)


def _pad(rows: Float[Array, "m a"]) -> Float[Array, "padded a"]:
    """So that a tile may begin at any row."""
    return jnp.pad(rows, ((0, CHUNK_ROWS), (0, 0)))


CHUNKED = Products(_forward, _dlhs, _drhs)
