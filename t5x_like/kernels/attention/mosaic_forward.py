"""The forward pass on Hopper GPUs, by Mosaic GPU: FlashAttention-3 (Shah et al. 2024, section 3.1) in Pallas.

A program has three warpgroups. One copies blocks of keys and values to shared memory, a few ahead; each of the others
has half of a block of queries. Barriers say when a copy has come, and when its place is free again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks
from t5x_like.kernels.attention.logits import MASK_VALUE
from t5x_like.kernels.attention.mosaic_products import add_product, transposed_product
from t5x_like.kernels.attention.mosaic_tiles import (
    COMPUTE,
    Stream,
    Tile,
    copy_keys,
    launch,
    query_block,
    split_work,
    spread,
    stream,
    tile_logits,
)
from t5x_like.kernels.attention.prepared import Inputs, Plan
from t5x_like.kernels.attention.triton_tiles import visit_all


class _Scratch(NamedTuple):
    """Shared memory, and its barriers; `q` has the output in the end."""

    q: Float[Any, "warpgroups rows head_dim"]
    lse: Float[Any, "warpgroups rows"]
    q_here: Any
    keys: Stream
    values: Stream


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
    keys = stream(blocks.stages, ((blocks.kv, head_dim), dtype))
    return launch(
        functools.partial(_kernel, plan, blocks, kv_length, num_heads // inputs.k.shape[2]),
        inputs,
        out_type=(
            jax.ShapeDtypeStruct(inputs.q.shape, dtype),
            jax.ShapeDtypeStruct((batch, num_heads, q_length), jnp.float32),
        ),
        scratch=_Scratch(
            q=plgpu.SMEM((COMPUTE, rows, head_dim), dtype),
            lse=plgpu.SMEM((COMPUTE, rows), jnp.float32),
            q_here=plgpu.Barrier(num_barriers=COMPUTE),
            keys=keys,
            values=keys,
        ),
        grid=(num_heads, q_length // blocks.q, batch),
        interpreted=plan.interpreted,
    )


def _kernel(plan, blocks, kv_length, group, inputs: Inputs, o_ref, lse_ref, scratch: _Scratch):
    (batch, head, kv_head), i, visits = query_block(inputs, group)

    def compute(warpgroup):
        start = i * blocks.q + warpgroup * scratch.q.shape[1]
        mine = pl.ds(start, scratch.q.shape[1])
        q, lse = scratch.q.at[warpgroup], scratch.lse.at[warpgroup]
        plgpu.copy_gmem_to_smem(inputs.q.at[batch, mine, head], q, scratch.q_here.at[warpgroup])
        plgpu.barrier_wait(scratch.q_here.at[warpgroup])
        starts = (inputs.context.offsets[0] + start, inputs.context.offsets[1])
        state = _attend(plan, blocks, kv_length, visits, q, scratch, starts)
        empty = state.total == 0.0
        total = jnp.where(empty, 1.0, state.total)
        q[...] = (state.values / spread(total, state.values.shape)).astype(q.dtype)
        lse[...] = jnp.where(empty, MASK_VALUE, state.largest + jnp.log(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, o_ref.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    split_work(compute, lambda: copy_keys(inputs, visits, batch, kv_head, scratch.keys, scratch.values))


def _attend(plan, blocks, kv_length, visits, q, scratch: _Scratch, starts) -> _State:
    """The online softmax of a warpgroup's queries over all blocks of keys with work."""
    rows, head_dim = q.shape

    def step(carry, j, plain):
        n, state = carry
        (k,) = scratch.keys.wait(n)
        scores = transposed_product(q, k, plan.interpreted)
        scratch.keys.done(n)
        first = j * blocks.kv
        logits = tile_logits(plan, Tile(starts[0], starts[1] + first, kv_length - first), scores, plain)
        largest = jnp.maximum(state.largest, logits.max(axis=1))
        weights = jnp.exp(logits - spread(largest, logits.shape))
        rescale = jnp.exp(state.largest - largest)
        total = state.total * rescale + weights.sum(axis=1)
        values = state.values * spread(rescale, state.values.shape)
        (v,) = scratch.values.wait(n)
        values = add_product(values, weights.astype(q.dtype), v, plan.interpreted)
        scratch.values.done(n)
        return n + 1, _State(largest, total, values)

    # The maximum starts above MASK_VALUE: in a row without allowed keys every exponential is exactly 0.
    start = _State(
        largest=jnp.full((rows,), MASK_VALUE / 2, jnp.float32),
        total=jnp.zeros((rows,), jnp.float32),
        values=jnp.zeros((rows, head_dim), jnp.float32),
    )
    return visit_all(visits, step, (jnp.int32(0), start))[1]
