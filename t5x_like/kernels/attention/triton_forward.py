"""The forward pass by Triton: FlashAttention-2 (Dao 2023) in Pallas, over the key blocks that have work."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks
from t5x_like.kernels.attention.logits import MASK_VALUE
from t5x_like.kernels.attention.prepared import Inputs, Plan
from t5x_like.kernels.attention.triton_specs import Specs
from t5x_like.kernels.attention.triton_tiles import (
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


class _State(NamedTuple):
    """The online softmax of each query: largest logit, sum of exponentials and weighted values, in parts."""

    largest: Float[Array, "q"]
    total: Float[Array, "q"]
    values: list[Float[Array, "q part"]]


def forward(
    plan: Plan, blocks: GpuBlocks, inputs: Inputs
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch heads q_length"]]:
    """Output and log-sum-exp. The grid is query blocks, heads, batch."""
    batch, q_length, num_heads, head_dim = inputs.q.shape
    num_kv_heads, v_dim = inputs.v.shape[2:]
    group, num_blocks = num_heads // num_kv_heads, q_length // blocks.q
    # The last queries come first: under a causal mask they have the most work.
    specs = Specs(lambda i, h, b: (b, num_blocks - 1 - i, h, lax.div(h, group)))
    run = pl.pallas_call(
        functools.partial(_kernel, plan, blocks),
        grid=(num_blocks, num_heads, batch),
        in_specs=[
            Inputs(
                q=specs.tokens(blocks.q, head_dim),
                k=specs.all_tokens(inputs.k),
                v=specs.all_tokens(inputs.v),
                context=specs.context(inputs.context),
            )
        ],
        out_specs=(specs.tokens(blocks.q, v_dim), specs.per_token(blocks.q)),
        out_shape=(
            jax.ShapeDtypeStruct(
                (batch, q_length, num_heads, v_dim), jnp.float32 if plan.exact_output else inputs.v.dtype
            ),
            jax.ShapeDtypeStruct((batch, num_heads, q_length), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=plan.interpreted,
        name="attention_forward",
    )
    return run(inputs)


def _kernel(plan: Plan, blocks: GpuBlocks, refs: Inputs, o_ref: Any, lse_ref: Any):
    i, head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    visits = Visits(*(refs.context.visits[field] for field in range(6)))
    q = load(refs.q, slice(None))

    def step(state: _State, j: Array, plain: bool) -> _State:
        keys = pl.ds(j * blocks.kv, blocks.kv)
        tile = make_tile(plan, blocks, refs.context, head, i, j, queries_are_rows=True)
        logits = tile_logits(plan, refs.context, tile, products(q, load(refs.k, keys)), plain)
        largest = jnp.maximum(state.largest, logits.max(axis=1))
        weights = jnp.exp(logits - largest[:, None])
        rescale = jnp.exp(state.largest - largest)
        values = [
            total * rescale[:, None] + dot(weights.astype(part.dtype), part)
            for total, part in zip(state.values, load(refs.v, keys), strict=True)
        ]
        return _State(largest, state.total * rescale + weights.sum(axis=1), values)

    # The maximum starts above MASK_VALUE: in a row without allowed keys every exponential is exactly 0.
    start = _State(
        largest=jnp.full(blocks.q, MASK_VALUE / 2, jnp.float32),
        total=jnp.zeros(blocks.q, jnp.float32),
        values=zeros(blocks.q, o_ref.shape[-1]),
    )
    state = visit_all(visits, step, start)
    empty = state.total == 0
    total = jnp.where(empty, 1, state.total)
    for part, values in zip(parts(o_ref.shape[-1]), state.values, strict=True):
        o_ref[:, part] = (values / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(empty, MASK_VALUE, state.largest + jnp.log(total))
