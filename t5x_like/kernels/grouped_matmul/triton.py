"""Grouped products on GPU, in Pallas' Triton: tiles begin where their group begins, so that no two share a row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from t5x_like.kernels.dot import dot
from t5x_like.kernels.grouped_matmul.cost import estimated_cost
from t5x_like.kernels.grouped_matmul.groups import tiles_of_groups
from t5x_like.kernels.grouped_matmul.products import Products
from t5x_like.kernels.grouped_matmul.tile_sizes import TileSizes, Tuning, gpu_tiles
from t5x_like.kernels.padding import pad
from t5x_like.kernels.varying import shape_varying_like


class Plan(NamedTuple):
    """The static part of a call; `interpreted`: see `target.compiling_for`."""

    tuning: Tuning
    interpreted: bool
    expected_rows: int


def _forward(plan: Plan, lhs: Float[Array, "m k"], rhs: Float[Array, "g k n"], group_sizes: Int[Array, "g"]):
    return _multiply(plan, "forward", lhs, rhs, group_sizes, contract=0)


def _dlhs(plan: Plan, dout: Float[Array, "m n"], rhs: Float[Array, "g k n"], group_sizes: Int[Array, "g"]):
    return _multiply(plan, "dlhs", dout, rhs, group_sizes, contract=1)


def _multiply(plan: Plan, product: str, rows: Array, rhs: Array, group_sizes: Array, contract: int):
    """Rows times the matrices of their groups, over dim `contract` of a matrix.

    The grid is tiles of the other dim, then tiles of rows: neighbours share rows, and a matrix at a time is in cache.
    """
    sizes = gpu_tiles(getattr(plan.tuning, product), len(rows), rhs)
    matrix_tile = (sizes.k, sizes.n)
    dim_out = rhs.shape[2 - contract]
    rows = pad(rows, 1, matrix_tile[contract])
    rhs = pad(pad(rhs, 1, sizes.k), 2, sizes.n)
    tiles = tiles_of_groups(group_sizes, len(rows), sizes.m, with_rest=True)
    steps_out = rhs.shape[2 - contract] // matrix_tile[1 - contract]
    run = pl.pallas_call(
        functools.partial(_multiply_kernel, sizes, contract),
        grid=(steps_out, len(tiles.group)),
        out_shape=shape_varying_like((len(rows), rhs.shape[2 - contract]), rows.dtype, (rows, rhs)),
        interpret=plan.interpreted,
        compiler_params=_compiler_params(),
        cost_estimate=estimated_cost(plan.expected_rows, rhs, (rows, steps_out)),
        name=f"grouped_matmul_{product}",
    )
    return run(tiles.group, tiles.first, tiles.end, rows, rhs)[:, :dim_out]


def _multiply_kernel(sizes: TileSizes, contract: int, group_ref, first_ref, end_ref, rows_ref, rhs_ref, out_ref):
    out_tile, tile = pl.program_id(0), pl.program_id(1)
    group, end = group_ref[tile], end_ref[tile]
    matrix_tile = (sizes.k, sizes.n)
    size_in, size_out = matrix_tile[contract], matrix_tile[1 - contract]
    row = first_ref[tile] + jnp.arange(sizes.m)[:, None]
    columns = out_tile * size_out + jnp.arange(size_out)

    def step(i, total):
        summed = i * size_in + jnp.arange(size_in)
        tile_rows = plt.load(rows_ref.at[row, summed[None]], mask=row < end, other=0)
        at = (summed[:, None], columns[None]) if contract == 0 else (columns[:, None], summed[None])
        return total + dot(tile_rows, plt.load(rhs_ref.at[(group, *at)]), (1, contract))

    # Rows of no group, and tiles without rows, have no steps.
    is_group = (group < rhs_ref.shape[0]) & (first_ref[tile] < end)
    steps = is_group.astype(jnp.int32) * (rows_ref.shape[1] // size_in)
    total = lax.fori_loop(0, steps, step, jnp.zeros((sizes.m, size_out), jnp.float32))
    plt.store(out_ref.at[row, columns[None]], total.astype(out_ref.dtype), mask=row < end)


def _drhs(plan: Plan, lhs: Float[Array, "m k"], dout: Float[Array, "m n"], group_sizes: Int[Array, "g"]):
    """The grid is tiles of n, tiles of k, groups; a group's rows are summed in order, by one program."""
    num_groups, num_rows = len(group_sizes), len(lhs)
    result = jax.ShapeDtypeStruct((num_groups, lhs.shape[1], dout.shape[1]), lhs.dtype)
    sizes = gpu_tiles(plan.tuning.drhs, num_rows, result)
    lhs, dout = pad(lhs, 1, sizes.k), pad(dout, 1, sizes.n)
    bounds = jnp.append(jnp.int32(0), jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), num_rows))
    run = pl.pallas_call(
        functools.partial(_drhs_kernel, sizes),
        grid=(dout.shape[1] // sizes.n, lhs.shape[1] // sizes.k, num_groups),
        out_shape=shape_varying_like((num_groups, lhs.shape[1], dout.shape[1]), lhs.dtype, (lhs, dout)),
        interpret=plan.interpreted,
        compiler_params=_compiler_params(),
        cost_estimate=estimated_cost(
            plan.expected_rows, result, (lhs, dout.shape[1] // sizes.n), (dout, lhs.shape[1] // sizes.k)
        ),
        name="grouped_matmul_drhs",
    )
    return run(bounds, lhs, dout)[:, : result.shape[1], : result.shape[2]]


def _drhs_kernel(sizes: TileSizes, bounds_ref, lhs_ref, dout_ref, out_ref):
    n, k, group = (pl.program_id(axis) for axis in range(3))
    first, end = bounds_ref[group], bounds_ref[group + 1]
    columns_k, columns_n = k * sizes.k + jnp.arange(sizes.k), n * sizes.n + jnp.arange(sizes.n)

    def step(i, total):
        row = first + i * sizes.m + jnp.arange(sizes.m)[:, None]
        load = lambda ref, columns: plt.load(ref.at[row, columns[None]], mask=row < end, other=0)
        return total + dot(load(lhs_ref, columns_k), load(dout_ref, columns_n), (0, 0))

    steps = lax.div(end - first + sizes.m - 1, sizes.m)
    total = lax.fori_loop(0, steps, step, jnp.zeros((sizes.k, sizes.n), jnp.float32))
    plt.store(out_ref.at[group, columns_k[:, None], columns_n[None]], total.astype(out_ref.dtype))


def _compiler_params() -> plt.CompilerParams:
    return plt.CompilerParams(num_warps=8, num_stages=3)


PRODUCTS = Products(_forward, _dlhs, _drhs)
