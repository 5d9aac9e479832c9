"""The backward pass on TPU, in one kernel: five matrix products per tile, and no partial sums in main memory.

The gradients of the keys and values of a head stay in vector memory while all its queries pass by, and are written
once; those of the queries are then summed per query block. Keys too many for that are split into parts, one after the
other, and the gradients of the queries summed over parts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.block_sizes import BlockSizes
from t5x_like.kernels.attention.blocks import Ranges
from t5x_like.kernels.attention.logits import through_soft_cap
from t5x_like.kernels.attention.prepared import Inputs, Plan
from t5x_like.kernels.attention.tpu_specs import SUBLANES, Place, Scalars, Specs, read_range
from t5x_like.kernels.attention.tpu_tiles import make_step, strip_gradient, tile_logits
from t5x_like.kernels.dot import dot


class Gradients(NamedTuple):
    """What the kernel writes; keys and values of one part."""

    q: Float[Any, "batch heads q_length head_dim"]
    k: Float[Any, "batch kv_heads kv_length head_dim"]
    v: Float[Any, "batch kv_heads kv_length v_dim"]
    strip: Float[Any, "batch heads 1 two_reach"] | None


class _Sums(NamedTuple):
    """The same while they are summed: of a query block, of a part of a key head, and of a query head."""

    q: Float[Any, "q head_dim"]
    k: Float[Any, "part head_dim"]
    v: Float[Any, "part v_dim"]
    strip: Float[Any, "8 two_reach"] | None


def backward(
    plan: Plan, sizes: BlockSizes, ranges: Ranges, scalars: Scalars, inputs: Inputs, part_blocks: int
) -> Gradients:
    """Gradients, with the keys in parts of `part_blocks` blocks."""
    num_parts = inputs.k.shape[2] // (part_blocks * sizes.kv)
    run = functools.partial(_run_part, plan, sizes, ranges, scalars, inputs, part_blocks)
    if num_parts == 1:
        return run(0, inputs.q.dtype)

    def step(sums, part):
        # Without the barrier, XLA fuses the kernel with what stores its results, and drops its memory limit.
        gradients = jax.lax.optimization_barrier(run(part * part_blocks, jnp.float32))
        add = lambda total, new: total + new
        return jax.tree.map(add, sums, (gradients.q, gradients.strip)), (gradients.k, gradients.v)

    zeros = lambda array: None if array is None else jnp.zeros(array.shape, jnp.float32)
    shapes = _out_shape(inputs, part_blocks * sizes.kv, jnp.float32)
    sums, (k, v) = jax.lax.scan(step, (zeros(shapes.q), zeros(shapes.strip)), jnp.arange(num_parts))
    joined = lambda parts: jnp.moveaxis(parts, 0, 2).reshape(*parts.shape[1:3], -1, parts.shape[-1])
    return Gradients(sums[0], joined(k), joined(v), sums[1])


def _run_part(
    plan: Plan,
    sizes: BlockSizes,
    ranges: Ranges,
    scalars: Scalars,
    inputs: Inputs,
    part_blocks: int,
    part_first: int | Int[Array, ""],
    dq_dtype: jnp.dtype,
) -> Gradients:
    """One part, from block `part_first` on.

    The grid is batch, key heads, query heads of a key head, query blocks, key blocks.
    """
    batch, num_heads, q_length, head_dim = inputs.q.shape
    num_kv_heads, _, v_dim = inputs.v.shape[1:]
    group, num_q_blocks = num_heads // num_kv_heads, q_length // sizes.q
    part = part_blocks * sizes.kv
    width = min(ranges.width, part_blocks)

    def place(b, h, g, i, j, ranges_ref, offsets_ref) -> Place:
        first, end, _, _ = _within(read_range(ranges_ref, b, i, num_q_blocks), offsets_ref[2], part_blocks)
        block = jnp.maximum(jnp.minimum(first + j, end - 1), 0)  # a step without work stays, so that it moves nothing
        return Place(b, h, h * group + g, i, block)

    specs = Specs(sizes, place)
    scores = batch * num_heads * q_length * width * sizes.kv
    run = pl.pallas_call(
        functools.partial(_kernel, plan, sizes, part_blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads, group, num_q_blocks, width),
            in_specs=[_in_specs(specs, inputs)],
            out_specs=[_out_specs(specs, inputs, part)],
            scratch_shapes=[_scratch(sizes, inputs, part)],
        ),
        out_shape=[_out_shape(inputs, part, dq_dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 2 + ("arbitrary",) * 3, vmem_limit_bytes=plan.tuning.vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * (3 * head_dim + 2 * v_dim),
            transcendentals=scores,
            bytes_accessed=2 * sum(array.nbytes for array in (inputs.q, inputs.k, inputs.v)),
        ),
        name="attention_backward",
    )
    offsets = scalars.offsets.at[2].set(part_first)
    return run(scalars.ranges, offsets, inputs)[0]


def _within(span: tuple, part_first: Array, part_blocks: int) -> tuple:
    """What a range of key blocks has in a part of the keys."""
    first, end, full_first, full_end = span
    return jnp.maximum(first, part_first), jnp.minimum(end, part_first + part_blocks), full_first, full_end


def _in_specs(specs: Specs, inputs: Inputs) -> Inputs:
    head_dim, v_dim = inputs.q.shape[3], inputs.v.shape[3]
    return Inputs(
        q=specs.queries(head_dim),
        k=specs.keys(head_dim),
        v=specs.keys(v_dim),
        do=specs.queries(v_dim),
        lse=specs.per_query(),
        delta=specs.per_query(),
        context=specs.context(inputs.context),
    )


def _out_specs(specs: Specs, inputs: Inputs, part: int) -> Gradients:
    strip = inputs.context.strip
    return Gradients(
        q=specs.queries(inputs.q.shape[3]),
        k=specs.all_keys(part, inputs.k.shape[3]),
        v=specs.all_keys(part, inputs.v.shape[3]),
        strip=None if strip is None else specs.strips(strip.shape[2]),
    )


def _scratch(sizes: BlockSizes, inputs: Inputs, part: int) -> _Sums:
    strip = inputs.context.strip
    memory = lambda rows, columns: pltpu.VMEM((rows, columns), jnp.float32)
    return _Sums(
        q=memory(sizes.q, inputs.q.shape[3]),
        k=memory(part, inputs.k.shape[3]),
        v=memory(part, inputs.v.shape[3]),
        strip=None if strip is None else memory(SUBLANES, strip.shape[2]),
    )


def _out_shape(inputs: Inputs, part: int, dq_dtype: jnp.dtype) -> Gradients:
    strip = inputs.context.strip
    of_part = lambda array: jax.ShapeDtypeStruct((*array.shape[:2], part, array.shape[3]), array.dtype)
    return Gradients(
        q=jax.ShapeDtypeStruct(inputs.q.shape, dq_dtype),
        k=of_part(inputs.k),
        v=of_part(inputs.v),
        strip=None if strip is None else jax.ShapeDtypeStruct((*inputs.q.shape[:2], *strip.shape[1:]), jnp.float32),
    )


def _kernel(
    plan: Plan, sizes: BlockSizes, part_blocks: int, ranges_ref, offsets_ref, refs: Inputs, out: Gradients, sums: _Sums
):
    b, h, g, i, j = (pl.program_id(axis) for axis in range(5))
    head = h * pl.num_programs(2) + g
    last_g, last_i, last_j = (pl.num_programs(axis) - 1 for axis in (2, 3, 4))
    span = _within(read_range(ranges_ref, b, i, pl.num_programs(3)), offsets_ref[2], part_blocks)
    step = make_step(plan, sizes, span, span[0] + j, i, offsets_ref)
    row = (step.block - offsets_ref[2]) * sizes.kv

    _zero_when((g == 0) & (i == 0) & (j == 0), sums.k, sums.v)
    _zero_when((i == 0) & (j == 0), sums.strip)
    _zero_when(j == 0, sums.q)

    def compute(plain: bool):
        for at in range(0, sizes.kv, sizes.compute):
            tile = functools.partial(tile_logits, plan, sizes, refs.context, head, step, at, plain=plain)
            dlogits = _add_tile(plan, sizes, refs, sums, tile, at, row + at)
            if sums.strip is not None:
                sums.strip[...] += strip_gradient(plan, sizes, dlogits, step, at, plain)

    pl.when(step.active & step.plain)(lambda: compute(plain=True))
    pl.when(step.active & ~step.plain)(lambda: compute(plain=False))

    @pl.when(j == last_j)
    def finish_queries():
        out.q[...] = (sums.q[...] * plan.scale).astype(out.q.dtype)

    @pl.when((g == last_g) & (i == last_i) & (j == last_j))
    def finish_keys():
        out.k[...] = (sums.k[...] * plan.scale).astype(out.k.dtype)
        out.v[...] = sums.v[...].astype(out.v.dtype)

    if sums.strip is not None:

        @pl.when((i == last_i) & (j == last_j))
        def finish_strip():
            out.strip[...] = sums.strip[...].sum(axis=0, keepdims=True)


def _zero_when(condition, *refs):
    @pl.when(condition)
    def zero():
        for ref in refs:
            if ref is not None:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _add_tile(plan, sizes, refs: Inputs, sums: _Sums, tile_logits, at: int, row) -> Float[Any, "compute q"]:
    """Adds what the keys from `at` of the block on give, which are those from `row` of the part on.

    Returns the gradient of scaled products plus bias.
    """
    k, v = (ref[pl.ds(at, sizes.compute)] for ref in (refs.k, refs.v))
    q, do = refs.q[...], refs.do[...]
    logits = tile_logits(dot(k, q, (1, 1)))
    weights = jnp.exp(logits - refs.lse[...])
    dlogits = weights * (dot(v, do, (1, 1)) - refs.delta[...])
    dlogits = through_soft_cap(dlogits, logits, plan.soft_cap)
    narrow = dlogits.astype(q.dtype)
    rows = pl.ds(pl.multiple_of(row, sizes.compute), sizes.compute)
    sums.v[rows] += dot(weights.astype(do.dtype), do, (1, 0))
    sums.k[rows] += dot(narrow, q, (1, 0))
    sums.q[...] += dot(narrow, k, (0, 0))
    return dlogits
