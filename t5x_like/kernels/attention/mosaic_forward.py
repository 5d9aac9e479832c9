"""The forward pass on Hopper GPUs, by Mosaic GPU: FlashAttention-3 (Shah et al. 2024, section 3.1) in Pallas.

A program has three warpgroups. One copies blocks of keys and values to shared memory, a few ahead; each of the others
has half of a block of queries. Barriers say when a copy has come, and when its place is free again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks
from t5x_like.kernels.attention.logits import MASK_VALUE, attention_logits
from t5x_like.kernels.attention.masks import position_rules
from t5x_like.kernels.attention.mosaic_products import add_product, interpretation, transposed_product
from t5x_like.kernels.attention.triton_tiles import Plan, Visits, visit_all

COMPUTE = 2
"""Warpgroups that compute; the one after them copies."""


class Inputs(NamedTuple):
    """What the kernel reads; lengths are whole blocks."""

    q: Float[Any, "batch q_length heads head_dim"]
    k: Float[Any, "batch kv_length kv_heads head_dim"]
    v: Float[Any, "batch kv_length kv_heads head_dim"]
    visits: Int[Any, "one q_blocks 6"]
    offsets: Int[Any, "2"]


class _Shared(NamedTuple):
    """Shared memory; `q` has the output in the end."""

    q: Float[Any, "warpgroups rows head_dim"]
    k: Float[Any, "stages kv head_dim"]
    v: Float[Any, "stages kv head_dim"]
    lse: Float[Any, "warpgroups rows"]


class _Barriers(NamedTuple):
    """What a warpgroup waits for: copies that have come, and places that are free."""

    q_here: Any
    k_here: Any
    v_here: Any
    k_free: Any
    v_free: Any


class _State(NamedTuple):
    """The online softmax of each query: largest logit, sum of exponentials and weighted values."""

    largest: Float[Array, "rows"]
    total: Float[Array, "rows"]
    values: Float[Array, "rows head_dim"]


def forward(
    plan: Plan, blocks: GpuBlocks, kv_length: int, inputs: Inputs
) -> tuple[Float[Array, "batch q_length heads head_dim"], Float[Array, "batch heads q_length"]]:
    """Output and log-sum-exp. The grid is heads, query blocks, batch; `kv_length` is that without padding."""
    batch, q_length, num_heads, head_dim = inputs.q.shape
    rows, dtype = blocks.q // COMPUTE, inputs.q.dtype
    tiles = lambda *shape: plgpu.SMEM(shape, dtype)
    run = plgpu.kernel(
        functools.partial(_kernel, plan, blocks, kv_length, num_heads // inputs.k.shape[2]),
        out_type=(
            jax.ShapeDtypeStruct(inputs.q.shape, dtype),
            jax.ShapeDtypeStruct((batch, num_heads, q_length), jnp.float32),
        ),
        scratch_types=[
            _Shared(
                q=tiles(COMPUTE, rows, head_dim),
                k=tiles(blocks.stages, blocks.kv, head_dim),
                v=tiles(blocks.stages, blocks.kv, head_dim),
                lse=plgpu.SMEM((COMPUTE, rows), jnp.float32),
            ),
            _Barriers(
                q_here=plgpu.Barrier(num_barriers=COMPUTE),
                k_here=plgpu.Barrier(num_barriers=blocks.stages),
                v_here=plgpu.Barrier(num_barriers=blocks.stages),
                k_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=blocks.stages),
                v_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=blocks.stages),
            ),
        ],
        grid=(num_heads, q_length // blocks.q, batch),
        grid_names=("head", "q_block", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpretation(plan.interpreted),
    )
    return run(*inputs)


def _kernel(plan, blocks, kv_length, group, *refs):
    *inputs, o_ref, lse_ref, shared, barriers = refs
    inputs = Inputs(*inputs)
    head, block, batch = (lax.axis_index(name) for name in ("head", "q_block", "batch"))
    i = lax.axis_size("q_block") - 1 - block  # the last queries first: under a causal mask they have the most work
    visits = Visits(*(inputs.visits[0, i, field] for field in range(6)))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE)
    def compute():
        plgpu.set_max_registers(232, action="increase")
        start = i * blocks.q + warpgroup * shared.q.shape[1]
        mine = pl.ds(start, shared.q.shape[1])
        q, lse = shared.q.at[warpgroup], shared.lse.at[warpgroup]
        plgpu.copy_gmem_to_smem(inputs.q.at[batch, mine, head], q, barriers.q_here.at[warpgroup])
        plgpu.barrier_wait(barriers.q_here.at[warpgroup])
        starts = (inputs.offsets[0] + start, inputs.offsets[1])
        state = _attend(plan, blocks, kv_length, visits, q, shared, barriers, starts)
        empty = state.total == 0.0
        total = jnp.where(empty, 1.0, state.total)
        q[...] = (state.values / _spread(total, state.values.shape)).astype(q.dtype)
        lse[...] = jnp.where(empty, MASK_VALUE, state.largest + jnp.log(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, o_ref.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def copy():
        plgpu.set_max_registers(40, action="decrease")
        _copy_blocks(blocks, visits, inputs, shared, barriers, batch, lax.div(head, jnp.int32(group)))


def _copy_blocks(blocks, visits, inputs: Inputs, shared: _Shared, barriers: _Barriers, batch, kv_head):
    """Brings all blocks of keys and values with work, each as soon as there is a place."""
    pairs = (
        (inputs.k, shared.k, barriers.k_here, barriers.k_free),
        (inputs.v, shared.v, barriers.v_here, barriers.v_free),
    )

    def step(n, j, plain):
        slot = lax.rem(n, jnp.int32(blocks.stages))
        for source, places, here, free in pairs:
            pl.when(n >= blocks.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            block = source.at[batch, pl.ds(j * blocks.kv, blocks.kv), kv_head]
            plgpu.copy_gmem_to_smem(block, places.at[slot], here.at[slot])
        return n + 1

    num_blocks = visit_all(visits, step, jnp.int32(0))
    for slot in range(blocks.stages):  # a barrier may not go while something is still to arrive
        for _, _, _, free in pairs:
            pl.when(num_blocks > slot)(lambda free=free, slot=slot: plgpu.barrier_wait(free.at[slot]))


def _attend(plan, blocks, kv_length, visits, q, shared: _Shared, barriers: _Barriers, starts) -> _State:
    """The online softmax of a warpgroup's queries over all blocks of keys with work."""
    rows, head_dim = q.shape

    def step(carry, j, plain):
        n, state = carry
        slot = lax.rem(n, jnp.int32(blocks.stages))
        plgpu.barrier_wait(barriers.k_here.at[slot])
        scores = transposed_product(q, shared.k.at[slot], plan.interpreted)
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        logits = _logits(plan, blocks, kv_length, scores, starts, j, plain)
        largest = jnp.maximum(state.largest, logits.max(axis=1))
        weights = jnp.exp(logits - _spread(largest, logits.shape))
        rescale = jnp.exp(state.largest - largest)
        total = state.total * rescale + weights.sum(axis=1)
        values = state.values * _spread(rescale, state.values.shape)
        plgpu.barrier_wait(barriers.v_here.at[slot])
        values = add_product(values, weights.astype(q.dtype), shared.v.at[slot], plan.interpreted)
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        return n + 1, _State(largest, total, values)

    # The maximum starts above MASK_VALUE: in a row without allowed keys every exponential is exactly 0.
    start = _State(
        largest=jnp.full((rows,), MASK_VALUE / 2, jnp.float32),
        total=jnp.zeros((rows,), jnp.float32),
        values=jnp.zeros((rows, head_dim), jnp.float32),
    )
    return visit_all(visits, step, (jnp.int32(0), start))[1]


def _logits(plan, blocks, kv_length, scores, starts, j, plain):
    mask = None
    if not plain:
        key = j * blocks.kv + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        query = starts[0] + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        rules = position_rules(plan.mask, query, starts[1] + key)
        mask = functools.reduce(jnp.logical_and, [*rules, key < kv_length])
    return attention_logits(scores, mask, scale=plan.scale, soft_cap=plan.soft_cap)


def _spread(column: Float[Array, "rows"], shape: tuple[int, int]) -> Float[Array, "rows x"]:
    return lax.broadcast_in_dim(column, shape, (0,))
