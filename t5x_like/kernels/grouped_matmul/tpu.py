"""Grouped products on TPU, in Pallas: a row tile is visited once for each group that has rows in it.

After MegaBlocks (Gale et al. 2022, section 5.1): which group and which row tile belong to each step of the grid is
worked out beforehand and lies in scalar memory. A row tile that groups share stays in vector memory, and each of them
writes its own rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from t5x_like.kernels.dot import dot
from t5x_like.kernels.grouped_matmul.cost import estimated_cost
from t5x_like.kernels.grouped_matmul.groups import tiles_of_rows
from t5x_like.kernels.grouped_matmul.products import Products
from t5x_like.kernels.grouped_matmul.tile_sizes import Tuning, tpu_tiles
from t5x_like.kernels.padding import pad
from t5x_like.kernels.varying import shape_varying_like


class _Visits(NamedTuple):
    """What is in scalar memory: group and row tile of each step, and which rows of the tile are the group's."""

    group: Int[Any, "steps"]
    tile: Int[Any, "steps"]
    first: Int[Any, "steps"]
    end: Int[Any, "steps"]


def _visits(group_sizes: Int[Array, "g"], num_rows: int, size: int, **options: bool) -> _Visits:
    tiles = tiles_of_rows(group_sizes, num_rows, size, **options)
    start = tiles.tile * size
    return _Visits(tiles.group, tiles.tile, tiles.first - start, tiles.end - start)


class Plan(NamedTuple):
    """The static part of a call."""

    tuning: Tuning
    vmem_limit_bytes: int
    expected_rows: int


def _forward(plan: Plan, lhs: Float[Array, "m k"], rhs: Float[Array, "g k n"], group_sizes: Int[Array, "g"]):
    return _multiply(plan, "forward", lhs, rhs, group_sizes, contract=0)


def _dlhs(plan: Plan, dout: Float[Array, "m n"], rhs: Float[Array, "g k n"], group_sizes: Int[Array, "g"]):
    return _multiply(plan, "dlhs", dout, rhs, group_sizes, contract=1)


def _multiply(plan: Plan, product: str, rows: Array, rhs: Array, group_sizes: Array, contract: int):
    """Rows times the matrices of their groups, over dim `contract` of a matrix.

    The grid is tiles of the other dim, visits, tiles of the contracted dim.
    """
    sizes = tpu_tiles(getattr(plan.tuning, product), len(rows), rhs)
    num_groups, matrix_tile = len(rhs), (sizes.k, sizes.n)
    size_in, size_out = matrix_tile[contract], matrix_tile[1 - contract]
    dim_out = rhs.shape[2 - contract]
    shape = (len(rows), dim_out)
    rows = pad(pad(rows, 0, sizes.m), 1, size_in)
    rhs = pad(pad(rhs, 1, sizes.k), 2, sizes.n)
    visits = _visits(group_sizes, len(rows), sizes.m, with_rest=True, with_empty=False)
    steps_in, steps_out = rows.shape[1] // size_in, -(-dim_out // size_out)

    def moved(visit, step, visits: _Visits):
        """Group, row tile and step of what is read; where nothing is computed, it stays the same."""
        works = _works(visits, visit, num_groups)
        group = jnp.minimum(visits.group[visit], num_groups - 1)
        return group, jnp.where(works, visits.tile[visit], 0), jnp.where(works, step, steps_in - 1)

    def rows_index(out, visit, step, *visits):
        _, tile, step = moved(visit, step, _Visits(*visits))
        return tile, step

    def rhs_index(out, visit, step, *visits):
        group, _, step = moved(visit, step, _Visits(*visits))
        return (group, step, out) if contract == 0 else (group, out, step)

    run = pl.pallas_call(
        functools.partial(_multiply_kernel, num_groups, contract),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(steps_out, len(visits.group), steps_in),
            in_specs=[
                pl.BlockSpec((sizes.m, size_in), rows_index),
                pl.BlockSpec((None, *matrix_tile), rhs_index),
            ],
            out_specs=pl.BlockSpec((sizes.m, size_out), lambda out, visit, step, *v: (_Visits(*v).tile[visit], out)),
            scratch_shapes=[pltpu.VMEM((sizes.m, size_out), jnp.float32)],
        ),
        out_shape=shape_varying_like((len(rows), steps_out * size_out), rows.dtype, (rows, rhs)),
        compiler_params=_compiler_params(plan, ("parallel", "arbitrary", "arbitrary")),
        cost_estimate=estimated_cost(plan.expected_rows, rhs, (rows, steps_out)),
        name=f"grouped_matmul_{product}",
    )
    return run(*visits, rows, rhs)[: shape[0], : shape[1]]


def _multiply_kernel(num_groups: int, contract: int, group, tile, first, end, rows_ref, rhs_ref, out_ref, sum_ref):
    visits = _Visits(group, tile, first, end)
    visit, step = pl.program_id(1), pl.program_id(2)
    last = step == pl.num_programs(2) - 1
    span = visits.first[visit], visits.end[visit]
    full = (span[0] == 0) & (span[1] == len(out_ref))

    @pl.when(step == 0)
    def start():
        sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)

    @pl.when(_works(visits, visit, num_groups))
    def add():
        sum_ref[...] += dot(rows_ref[...], rhs_ref[...], (1, contract))

    @pl.when(last & full)
    def store():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    @pl.when(last & ~full & (span[0] < span[1]))
    def store_own_rows():
        others = out_ref[...].astype(jnp.float32)
        out_ref[...] = jnp.where(_inside(span, len(out_ref)), sum_ref[...], others).astype(out_ref.dtype)


def _works(visits: _Visits, visit: Array, num_groups: int) -> Bool[Array, ""]:
    """Whether a step multiplies anything: its rows are of a group, and there are some."""
    return (visits.group[visit] < num_groups) & (visits.first[visit] < visits.end[visit])


def _inside(span: tuple[Array, Array], size: int) -> Bool[Array, "size 1"]:
    row = lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (row >= span[0]) & (row < span[1])


def _drhs(plan: Plan, lhs: Float[Array, "m k"], dout: Float[Array, "m n"], group_sizes: Int[Array, "g"]):
    """The grid is tiles of k, tiles of n, visits."""
    shape = (len(group_sizes), lhs.shape[1], dout.shape[1])
    result = jax.ShapeDtypeStruct(shape, lhs.dtype)
    sizes = tpu_tiles(plan.tuning.drhs, len(lhs), result)
    lhs, dout = pad(pad(lhs, 0, sizes.m), 1, sizes.k), pad(pad(dout, 0, sizes.m), 1, sizes.n)
    visits = _visits(group_sizes, len(lhs), sizes.m, with_rest=False, with_empty=True)
    steps_k, steps_n = lhs.shape[1] // sizes.k, dout.shape[1] // sizes.n
    run = pl.pallas_call(
        _drhs_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(steps_k, steps_n, len(visits.group)),
            in_specs=[
                pl.BlockSpec((sizes.m, sizes.k), lambda k, n, visit, *v: (_Visits(*v).tile[visit], k)),
                pl.BlockSpec((sizes.m, sizes.n), lambda k, n, visit, *v: (_Visits(*v).tile[visit], n)),
            ],
            out_specs=pl.BlockSpec((None, sizes.k, sizes.n), lambda k, n, visit, *v: (_Visits(*v).group[visit], k, n)),
            scratch_shapes=[pltpu.VMEM((sizes.k, sizes.n), jnp.float32)],
        ),
        out_shape=shape_varying_like((shape[0], lhs.shape[1], dout.shape[1]), lhs.dtype, (lhs, dout)),
        compiler_params=_compiler_params(plan, ("parallel", "parallel", "arbitrary")),
        cost_estimate=estimated_cost(plan.expected_rows, result, (lhs, steps_n), (dout, steps_k)),
        name="grouped_matmul_drhs",
    )
    return run(*visits, lhs, dout)[:, : shape[1], : shape[2]]


def _drhs_kernel(group, tile, first, end, lhs_ref, dout_ref, out_ref, sum_ref):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    span = first[visit], end[visit]
    full = (span[0] == 0) & (span[1] == len(lhs_ref))

    @pl.when((visit == 0) | (group[visit] != group[jnp.maximum(visit - 1, 0)]))
    def start():
        sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)

    @pl.when(full)
    def add():
        sum_ref[...] += dot(lhs_ref[...], dout_ref[...], (0, 0))

    @pl.when(~full & (span[0] < span[1]))
    def add_own_rows():
        inside = _inside(span, len(lhs_ref))
        own = lambda ref: jnp.where(inside, ref[...].astype(jnp.float32), 0).astype(ref.dtype)
        sum_ref[...] += dot(own(lhs_ref), own(dout_ref), (0, 0))

    @pl.when((visit == last) | (group[visit] != group[jnp.minimum(visit + 1, last)]))
    def store():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _compiler_params(plan: Plan, dimension_semantics: tuple[str, ...]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=plan.vmem_limit_bytes)


PRODUCTS = Products(_forward, _dlhs, _drhs)
