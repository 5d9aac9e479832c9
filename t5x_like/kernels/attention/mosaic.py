"""Attention on Hopper GPUs: the forward pass by Mosaic GPU, in mosaic_forward.py, and the backward pass by Triton."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.kernels.attention import mosaic_forward, triton
from t5x_like.kernels.attention.blocks import Tokens, consecutive, pad, padded_tokens
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import differentiable
from t5x_like.kernels.attention.gpu_block_sizes import mosaic_blocks
from t5x_like.kernels.attention.triton_tiles import Plan, make_visits


def mosaic_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads head_dim"], Float[Array, "batch q_length heads"]]:
    """Attention by Pallas kernels. See `attention` for the arguments."""
    return triton.run(_attend, call)


def _forward(plan: Plan, trained: tuple, fixed: triton.Fixed):
    q, k, v, _ = trained
    q_length, kv_length = q.shape[1], k.shape[1]
    blocks = mosaic_blocks(q.shape[3])
    positions = fixed.positions
    if positions is None:
        positions = tuple(map(consecutive, plan.offsets, (q_length, kv_length)))
    tokens = padded_tokens(Tokens(positions, None), blocks.q, blocks.kv)
    inputs = mosaic_forward.Inputs(
        q=pad(q, 1, blocks.q),
        k=pad(k, 1, blocks.kv),
        v=pad(v, 1, blocks.kv),
        visits=make_visits(plan, tokens, blocks)[0],
        offsets=jnp.asarray(fixed.offsets, jnp.int32),
    )
    o, lse = mosaic_forward.forward(plan, blocks, kv_length, inputs)
    return o[:, :q_length], lse[:, :, :q_length].swapaxes(1, 2)


_attend = differentiable(_forward, triton.backward)
