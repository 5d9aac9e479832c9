"""The forward pass on TPU: FlashAttention (Dao et al. 2022) in Pallas, over the key blocks that have work."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from t5x_like.kernels.attention.block_sizes import BlockSizes
from t5x_like.kernels.attention.blocks import Ranges
from t5x_like.kernels.attention.logits import MASK_VALUE
from t5x_like.kernels.attention.prepared import Inputs, Plan
from t5x_like.kernels.attention.tpu_specs import Place, Scalars, Specs, read_range
from t5x_like.kernels.attention.tpu_tiles import make_step, tile_logits
from t5x_like.kernels.dot import dot


class _State(NamedTuple):
    """The online softmax: largest logit, sum of exponentials and weighted values, one column per query."""

    largest: Float[Any, "1 q"]
    total: Float[Any, "1 q"]
    values: Float[Any, "v_dim q"]


def forward(
    plan: Plan, sizes: BlockSizes, ranges: Ranges, scalars: Scalars, inputs: Inputs
) -> tuple[Float[Array, "batch heads q_length v_dim"], Float[Array, "batch heads 1 q_length"]]:
    """Output and log-sum-exp. The grid is batch, key heads, query heads of a key head, query blocks, key blocks."""
    batch, num_heads, q_length, head_dim = inputs.q.shape
    num_kv_heads, _, v_dim = inputs.v.shape[1:]
    group, num_q_blocks = num_heads // num_kv_heads, q_length // sizes.q

    def place(b, h, g, i, j, ranges_ref, offsets_ref) -> Place:
        first, end, _, _ = read_range(ranges_ref, b, i, num_q_blocks)
        block = jnp.maximum(jnp.minimum(first + j, end - 1), 0)  # a step without work stays, so that it moves nothing
        return Place(b, h, h * group + g, i, block)

    specs = Specs(sizes, place)
    scores = batch * num_heads * q_length * ranges.width * sizes.kv
    run = pl.pallas_call(
        functools.partial(_kernel, plan, sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads, group, num_q_blocks, ranges.width),
            in_specs=[
                Inputs(specs.queries(head_dim), specs.keys(head_dim), specs.keys(v_dim), specs.context(inputs.context))
            ],
            out_specs=(specs.queries(v_dim), specs.per_query()),
            scratch_shapes=[_State(*(pltpu.VMEM((rows, sizes.q), jnp.float32) for rows in (1, 1, v_dim)))],
        ),
        out_shape=(
            jax.ShapeDtypeStruct(
                (batch, num_heads, q_length, v_dim), jnp.float32 if plan.exact_output else inputs.v.dtype
            ),
            jax.ShapeDtypeStruct((batch, num_heads, 1, q_length), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",), vmem_limit_bytes=plan.tuning.vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * (head_dim + v_dim),
            transcendentals=scores,
            bytes_accessed=sum(array.nbytes for array in (inputs.q, inputs.k, inputs.v, inputs.q)),
        ),
        name="attention_forward",
    )
    return run(*scalars, inputs)


def _kernel(plan: Plan, sizes: BlockSizes, ranges_ref, offsets_ref, refs: Inputs, o_ref, lse_ref, state: _State):
    b, h, g, i, j = (pl.program_id(axis) for axis in range(5))
    head, last = h * pl.num_programs(2) + g, pl.num_programs(4) - 1
    span = read_range(ranges_ref, b, i, pl.num_programs(3))
    step = make_step(plan, sizes, span, span[0] + j, i, offsets_ref)

    @pl.when(j == 0)
    def start():
        # Above MASK_VALUE: in a row without allowed keys every exponential is exactly 0.
        state.largest[...] = jnp.full(state.largest.shape, MASK_VALUE / 2, jnp.float32)
        state.total[...] = jnp.zeros(state.total.shape, jnp.float32)
        state.values[...] = jnp.zeros(state.values.shape, jnp.float32)

    def compute(plain: bool):
        for at in range(0, sizes.kv, sizes.compute):
            keys, values = (ref[pl.ds(at, sizes.compute)] for ref in (refs.k, refs.v))
            products = dot(keys, refs.q[...], (1, 1))
            logits = tile_logits(plan, sizes, refs.context, head, step, at, products, plain)
            largest = jnp.maximum(state.largest[...], logits.max(axis=0, keepdims=True))
            weights = jnp.exp(logits - largest)
            rescale = jnp.exp(state.largest[...] - largest)
            state.largest[...] = largest
            state.total[...] = state.total[...] * rescale + weights.sum(axis=0, keepdims=True)
            state.values[...] = state.values[...] * rescale + dot(values, weights.astype(values.dtype), (0, 0))

    pl.when(step.active & step.plain)(lambda: compute(plain=True))
    pl.when(step.active & ~step.plain)(lambda: compute(plain=False))

    @pl.when(j == last)
    def finish():
        empty = state.total[...] == 0
        total = jnp.where(empty, 1, state.total[...])
        o_ref[...] = jnp.transpose(state.values[...] / total).astype(o_ref.dtype)
        lse_ref[...] = jnp.where(empty, MASK_VALUE, state.largest[...] + jnp.log(total))
