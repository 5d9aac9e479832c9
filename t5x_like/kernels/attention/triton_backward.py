"""The backward pass by Triton, in two kernels: one per query block, for its gradients, and one per key block.

Nothing is added up by atomic operations, so results are the same in every run. The gradient of the relative bias
leaves the first kernel as a band: a row per query, with a number for each distance that is near; its sum is the rest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks
from t5x_like.kernels.attention.logits import through_soft_cap
from t5x_like.kernels.attention.prepared import Inputs, Plan
from t5x_like.kernels.attention.triton_specs import Specs
from t5x_like.kernels.attention.triton_tiles import (
    Tile,
    Visits,
    dot,
    load,
    make_tile,
    parts,
    products,
    tile_logits,
    visit_all,
    zeros,
)


class StripSums(NamedTuple):
    """The gradient of the relative bias, query by query.

    Attributes:
      band: by key position minus query position, from -reach to reach - 1; the first of these is unused, and zero.
      before: of all keys at -reach and further.
      after: of all keys at reach and further.
    """

    band: Float[Any, "batch heads q_length two_reach"]
    before: Float[Any, "batch heads q_length"]
    after: Float[Any, "batch heads q_length"]

    def total(self) -> Float[Array, "heads two_reach_and_one"]:
        """The gradient of `Context.strip`."""
        before, after = (part.sum(axis=(0, 2))[:, None] for part in (self.before, self.after))
        band = jnp.sum(self.band, axis=(0, 2), dtype=jnp.float32)
        return jnp.concatenate([before, band[:, 1:], after], axis=1)


def backward_q(
    plan: Plan, blocks: GpuBlocks, inputs: Inputs
) -> tuple[Float[Array, "batch q_length heads head_dim"], StripSums | None]:
    """The gradients of the queries and of the relative bias. The grid is query blocks, heads, batch."""
    batch, q_length, num_heads, head_dim = inputs.q.shape
    group, num_blocks = num_heads // inputs.k.shape[2], q_length // blocks.q
    specs = Specs(lambda i, h, b: (b, num_blocks - 1 - i, h, lax.div(h, group)))
    in_specs = Inputs(
        q=specs.tokens(blocks.q, head_dim),
        k=specs.all_tokens(inputs.k),
        v=specs.all_tokens(inputs.v),
        do=specs.tokens(blocks.q, inputs.do.shape[3]),
        lse=specs.per_token(blocks.q),
        delta=specs.per_token(blocks.q),
        context=specs.context(inputs.context),
    )
    sums, sum_specs = None, None
    if plan.relative_bias is not None:
        row = jnp.zeros(inputs.lse.shape, jnp.float32)
        sums = StripSums(jnp.zeros((*inputs.lse.shape, 2 * plan.reach), inputs.q.dtype), row, row)
        sum_specs = StripSums(specs.per_token_rows(blocks.q, 2 * plan.reach), *(specs.per_token(blocks.q),) * 2)
    run = pl.pallas_call(
        functools.partial(_q_kernel, plan, blocks),
        grid=(num_blocks, num_heads, batch),
        in_specs=[sum_specs, in_specs],
        out_specs=(sum_specs, specs.tokens(blocks.q, head_dim)),
        out_shape=jax.eval_shape(lambda: (sums, inputs.q)),
        input_output_aliases={n: n for n in range(len(jax.tree.leaves(sums)))},  # distances out of reach stay zero
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=plan.interpreted,
        name="attention_backward_q",
    )
    sums, dq = run(sums, inputs)
    return dq, sums


def _q_kernel(plan: Plan, blocks: GpuBlocks, _, refs: Inputs, sums: StripSums | None, dq_ref: Any):
    i, head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    visits = Visits(*(refs.context.visits[field] for field in range(6)))
    q, do = load(refs.q, slice(None)), load(refs.do, slice(None))
    lse, delta = refs.lse[...][:, None], refs.delta[...][:, None]

    def step(carry, j: Array, plain: bool):
        dq, far = carry
        keys = pl.ds(j * blocks.kv, blocks.kv)
        tile = make_tile(plan, blocks, refs.context, head, i, j, queries_are_rows=True)
        k = load(refs.k, keys)
        logits = tile_logits(plan, refs.context, tile, products(q, k), plain)
        weights = jnp.exp(logits - lse)
        dlogits = through_soft_cap(weights * (products(do, load(refs.v, keys)) - delta), logits, plan.soft_cap)
        narrow = dlogits.astype(k[0].dtype)
        if sums is not None:
            far = _add_strip(plan, sums, far, tile, dlogits, narrow, plain)
        return [total + dot(narrow, part) for total, part in zip(dq, k, strict=True)], far

    far = None if sums is None else (jnp.zeros(blocks.q, jnp.float32),) * 2
    dq, far = visit_all(visits, step, (zeros(blocks.q, dq_ref.shape[-1]), far))
    _store(dq_ref, dq, plan.scale)
    if sums is not None:
        sums.before[...], sums.after[...] = far


def _add_strip(
    plan: Plan, sums: StripSums, far: tuple, tile: Tile, dlogits: Array, narrow: Array, plain: bool
) -> tuple[Float[Array, "q"], Float[Array, "q"]]:
    """Stores what is near in the band, and returns the sums of the rest."""
    before, after = far
    if plain:
        total = dlogits.sum(axis=1)
        return before + jnp.where(tile.ahead > 0, total, 0), after + jnp.where(tile.ahead > 0, 0, total)
    relative = tile.kv_positions - tile.q_positions
    column = jnp.clip(relative, -plan.reach, plan.reach - 1) + plan.reach
    rows = jnp.broadcast_to(jnp.arange(column.shape[0])[:, None], column.shape)
    plt.store(sums.band.at[rows, column], narrow, mask=jnp.abs(relative) < plan.reach)
    return (
        before + jnp.where(relative <= -plan.reach, dlogits, 0).sum(axis=1),
        after + jnp.where(relative >= plan.reach, dlogits, 0).sum(axis=1),
    )


def backward_kv(
    plan: Plan, blocks: GpuBlocks, inputs: Inputs
) -> tuple[Float[Array, "batch kv_length kv_heads head_dim"], Float[Array, "batch kv_length kv_heads v_dim"]]:
    """The gradients of keys and values. The grid is key blocks, key heads, batch."""
    batch, kv_length, num_kv_heads, head_dim = inputs.k.shape
    v_dim = inputs.v.shape[3]
    group = inputs.q.shape[2] // num_kv_heads
    specs = Specs(lambda j, h, b: (b, j, h, h))
    own = (specs.tokens(blocks.kv, head_dim), specs.tokens(blocks.kv, v_dim))
    run = pl.pallas_call(
        functools.partial(_kv_kernel, plan, blocks, group),
        grid=(kv_length // blocks.kv, num_kv_heads, batch),
        in_specs=[
            Inputs(
                q=specs.group_tokens(inputs.q, group),
                k=own[0],
                v=own[1],
                do=specs.group_tokens(inputs.do, group),
                lse=specs.group_per_token(inputs.lse, group),
                delta=specs.group_per_token(inputs.delta, group),
                context=specs.context(inputs.context),
            )
        ],
        out_specs=own,
        out_shape=jax.eval_shape(lambda: (inputs.k, inputs.v)),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=plan.interpreted,
        name="attention_backward_kv",
    )
    return run(inputs)


def _kv_kernel(plan: Plan, blocks: GpuBlocks, group: int, refs: Inputs, dk_ref: Any, dv_ref: Any):
    """Tiles have keys as rows here, so that no tile has to be turned."""
    j, kv_head = pl.program_id(0), pl.program_id(1)
    visits = Visits(*(refs.context.visits[field] for field in range(6)))
    k, v = load(refs.k, slice(None)), load(refs.v, slice(None))

    def of_head(g: Array, carry):
        def step(carry, i: Array, plain: bool):
            dk, dv = carry
            queries = pl.ds(i * blocks.q, blocks.q)
            tile = make_tile(plan, blocks, refs.context, kv_head * group + g, i, j, queries_are_rows=False)
            q, do = load(refs.q, queries, g), load(refs.do, queries, g)
            logits = tile_logits(plan, refs.context, tile, products(k, q), plain)
            weights = jnp.exp(logits - refs.lse[g, queries][None, :])
            dlogits = weights * (products(v, do) - refs.delta[g, queries][None, :])
            narrow = through_soft_cap(dlogits, logits, plan.soft_cap).astype(q[0].dtype)
            weights = weights.astype(do[0].dtype)
            add = lambda totals, tile, rows: [t + dot(tile, part) for t, part in zip(totals, rows, strict=True)]
            return add(dk, narrow, q), add(dv, weights, do)

        return visit_all(visits, step, carry)

    start = (zeros(blocks.kv, dk_ref.shape[-1]), zeros(blocks.kv, dv_ref.shape[-1]))
    dk, dv = lax.fori_loop(0, group, of_head, start)
    _store(dk_ref, dk, plan.scale)
    _store(dv_ref, dv, 1.0)


def _store(ref: Any, totals: list[Float[Array, "x part"]], factor: float):
    for part, total in zip(parts(ref.shape[-1]), totals, strict=True):
        ref[:, part] = (total * factor).astype(ref.dtype)
