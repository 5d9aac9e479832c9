"""The backward pass on Hopper GPUs, by Mosaic GPU, in two kernels: one per query block, and one per key block.

As in mosaic_forward.py, one warpgroup copies and two compute: each has half of the block whose gradients are summed,
and sees all blocks of the other side that have work. Gradients are summed in registers, and written once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks
from t5x_like.kernels.attention.logits import through_soft_cap
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
    visits_of,
)
from t5x_like.kernels.attention.prepared import Inputs, Plan
from t5x_like.kernels.attention.triton_tiles import visit_all


class _QueryScratch(NamedTuple):
    """Shared memory, and its barriers, of the kernel for queries; `q` has its gradient in the end."""

    q: Float[Any, "warpgroups rows head_dim"]
    do: Float[Any, "warpgroups rows head_dim"]
    lse: Float[Any, "warpgroups rows"]
    delta: Float[Any, "warpgroups rows"]
    here: Any
    keys: Stream
    values: Stream


class _KeyScratch(NamedTuple):
    """The same for keys; `k` and `v` have their gradients in the end."""

    k: Float[Any, "warpgroups rows head_dim"]
    v: Float[Any, "warpgroups rows head_dim"]
    here: Any
    queries: Stream
    outputs: Stream


def backward_q(
    plan: Plan, blocks: GpuBlocks, kv_length: int, inputs: Inputs
) -> Float[Array, "batch q_length heads head_dim"]:
    """The gradients of the queries. The grid is heads, query blocks, batch; `kv_length` is that without padding."""
    batch, q_length, num_heads, head_dim = inputs.q.shape
    rows, dtype = blocks.q // COMPUTE, inputs.q.dtype
    own, numbers = plgpu.SMEM((COMPUTE, rows, head_dim), dtype), plgpu.SMEM((COMPUTE, rows), jnp.float32)
    here = plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTE)
    keys = stream(blocks.stages, ((blocks.kv, head_dim), dtype))
    return launch(
        functools.partial(_q_kernel, plan, blocks, kv_length, num_heads // inputs.k.shape[2]),
        inputs,
        out_type=jax.ShapeDtypeStruct(inputs.q.shape, dtype),
        scratch=_QueryScratch(own, own, numbers, numbers, here, keys=keys, values=keys),
        grid=(num_heads, q_length // blocks.q, batch),
        interpreted=plan.interpreted,
    )


def _q_kernel(plan, blocks, kv_length, group, inputs: Inputs, dq_ref, scratch: _QueryScratch):
    (batch, head, kv_head), i, visits = query_block(inputs, group)

    def compute(warpgroup):
        start = i * blocks.q + warpgroup * scratch.q.shape[1]
        mine = pl.ds(start, scratch.q.shape[1])
        own = scratch._replace(**{name: getattr(scratch, name).at[warpgroup] for name in ("q", "do", "lse", "delta")})
        here = scratch.here.at[warpgroup]
        for source, place in ((inputs.q, own.q), (inputs.do, own.do)):
            plgpu.copy_gmem_to_smem(source.at[batch, mine, head], place, here)
        for source, place in ((inputs.lse, own.lse), (inputs.delta, own.delta)):
            plgpu.copy_gmem_to_smem(source.at[batch, head, mine], place, here)
        plgpu.barrier_wait(here)
        starts = (inputs.context.offsets[0] + start, inputs.context.offsets[1])
        dq = _sum_over_keys(plan, blocks, kv_length, visits, own, starts)
        own.q[...] = (dq * plan.scale).astype(own.q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own.q, dq_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    split_work(compute, lambda: copy_keys(inputs, visits, batch, kv_head, scratch.keys, scratch.values))


def _sum_over_keys(plan, blocks, kv_length, visits, own: _QueryScratch, starts) -> Float[Array, "rows head_dim"]:
    """The gradient of a warpgroup's queries, not yet scaled."""
    rows, head_dim = own.q.shape
    lse, delta = own.lse[...], own.delta[...]

    def step(carry, j, plain):
        n, dq = carry
        (k,), first = own.keys.wait(n), j * blocks.kv
        scores = transposed_product(own.q, k, plan.interpreted)
        logits = tile_logits(plan, Tile(starts[0], starts[1] + first, kv_length - first), scores, plain)
        weights = jnp.exp(logits - spread(lse, logits.shape))
        (v,) = own.values.wait(n)
        dweights = transposed_product(own.do, v, plan.interpreted)
        own.values.done(n)
        dlogits = through_soft_cap(weights * (dweights - spread(delta, logits.shape)), logits, plan.soft_cap)
        dq = add_product(dq, dlogits.astype(k.dtype), k, plan.interpreted)
        own.keys.done(n)
        return n + 1, dq

    return visit_all(visits, step, (jnp.int32(0), jnp.zeros((rows, head_dim), jnp.float32)))[1]


def backward_kv(
    plan: Plan, blocks: GpuBlocks, kv_length: int, inputs: Inputs
) -> tuple[Float[Array, "batch kv_length kv_heads head_dim"], Float[Array, "batch kv_length kv_heads head_dim"]]:
    """The gradients of keys and values. The grid is key heads, key blocks, batch."""
    batch, padded_length, num_kv_heads, head_dim = inputs.k.shape
    rows, dtype = blocks.kv // COMPUTE, inputs.q.dtype
    own = plgpu.SMEM((COMPUTE, rows, head_dim), dtype)
    here = plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE)
    queries = stream(blocks.stages, ((blocks.q, head_dim), dtype), ((blocks.q,), jnp.float32))
    shape = jax.ShapeDtypeStruct(inputs.k.shape, dtype)
    return launch(
        functools.partial(_kv_kernel, plan, blocks, kv_length, inputs.q.shape[2] // num_kv_heads),
        inputs,
        out_type=(shape, shape),
        scratch=_KeyScratch(own, own, here, queries=queries, outputs=queries),
        grid=(num_kv_heads, padded_length // blocks.kv, batch),
        interpreted=plan.interpreted,
    )


def _kv_kernel(plan, blocks, kv_length, group, inputs: Inputs, dk_ref, dv_ref, scratch: _KeyScratch):
    kv_head, j, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    visits = visits_of(inputs, j)

    def compute(warpgroup):
        start = j * blocks.kv + warpgroup * scratch.k.shape[1]
        mine = (batch, pl.ds(start, scratch.k.shape[1]), kv_head)
        own = scratch._replace(k=scratch.k.at[warpgroup], v=scratch.v.at[warpgroup])
        here = scratch.here.at[warpgroup]
        plgpu.copy_gmem_to_smem(inputs.k.at[mine], own.k, here)
        plgpu.copy_gmem_to_smem(inputs.v.at[mine], own.v, here)
        plgpu.barrier_wait(here)
        tile = Tile(inputs.context.offsets[0], inputs.context.offsets[1] + start, kv_length - start, keys_are_rows=True)
        dk, dv = _sum_over_queries(plan, blocks, group, visits, own, tile)
        own.k[...] = (dk * plan.scale).astype(own.k.dtype)
        own.v[...] = dv.astype(own.v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own.k, dk_ref.at[mine])
        plgpu.copy_smem_to_gmem(own.v, dv_ref.at[mine])
        plgpu.wait_smem_to_gmem(0)

    def copy():
        def of_head(g, n):
            head = kv_head * group + g

            def step(n, i, plain):
                queries = pl.ds(i * blocks.q, blocks.q)
                tokens, numbers = (batch, queries, head), (batch, head, queries)
                scratch.queries.bring(n, inputs.q.at[tokens], inputs.lse.at[numbers])
                scratch.outputs.bring(n, inputs.do.at[tokens], inputs.delta.at[numbers])
                return n + 1

            return visit_all(visits, step, n)

        num_blocks = lax.fori_loop(0, group, of_head, jnp.int32(0))
        scratch.queries.drain(num_blocks)
        scratch.outputs.drain(num_blocks)

    split_work(compute, copy)


def _sum_over_queries(plan, blocks, group, visits, own: _KeyScratch, tile: Tile):
    """The gradients of a warpgroup's keys, not yet scaled, and values. Tiles have keys as rows: none is turned."""

    def step(carry, i, plain):
        n, dk, dv = carry
        q, lse = own.queries.wait(n)
        scores = transposed_product(own.k, q, plan.interpreted)
        here = tile._replace(q_start=tile.q_start + i * blocks.q)
        logits = tile_logits(plan, here, scores, plain)
        weights = jnp.exp(logits - spread(lse[...], logits.shape, axis=1))
        do, delta = own.outputs.wait(n)
        dv = add_product(dv, weights.astype(do.dtype), do, plan.interpreted)
        dweights = transposed_product(own.v, do, plan.interpreted)
        dlogits = weights * (dweights - spread(delta[...], logits.shape, axis=1))
        own.outputs.done(n)
        narrow = through_soft_cap(dlogits, logits, plan.soft_cap).astype(q.dtype)
        dk = add_product(dk, narrow, q, plan.interpreted)
        own.queries.done(n)
        return n + 1, dk, dv

    zeros = jnp.zeros(own.k.shape, jnp.float32)
    of_head = lambda g, carry: visit_all(visits, step, carry)
    return lax.fori_loop(0, group, of_head, (jnp.int32(0), zeros, zeros))[1:]
