"""Attention on Hopper GPUs: prepares arrays for the Mosaic GPU kernels in mosaic_forward.py and mosaic_backward.py.

At head_dim 256 the backward pass is that of Triton.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.kernels.attention import mosaic_backward, mosaic_forward, triton
from t5x_like.kernels.attention.blocks import Tokens, consecutive, padded_tokens
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import differentiable
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks, mosaic_tuning
from t5x_like.kernels.attention.triton_tiles import Plan, make_visits
from t5x_like.kernels.padding import pad


def mosaic_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads head_dim"], Float[Array, "batch q_length heads"]]:
    """Attention by Pallas kernels. See `attention` for the arguments."""
    return triton.run(_attend, call)


def _visits(plan: Plan, blocks: GpuBlocks, fixed: triton.Fixed, lengths: tuple[int, int]) -> tuple[Array, Array]:
    """`triton_tiles.make_visits` of a call without segments."""
    positions = fixed.positions
    if positions is None:
        positions = tuple(map(consecutive, plan.offsets, lengths))
    return make_visits(plan, padded_tokens(Tokens(positions, None), blocks.q, blocks.kv), blocks)


def _forward(plan: Plan, trained: tuple, fixed: triton.Fixed):
    q, k, v, _ = trained
    q_length, kv_length = q.shape[1], k.shape[1]
    tuning = mosaic_tuning(q.shape[3])
    blocks = tuning if isinstance(tuning, GpuBlocks) else tuning.forward
    inputs = mosaic_forward.Inputs(
        q=pad(q, 1, blocks.q),
        k=pad(k, 1, blocks.kv),
        v=pad(v, 1, blocks.kv),
        visits=_visits(plan, blocks, fixed, (q_length, kv_length))[0],
        offsets=jnp.asarray(fixed.offsets, jnp.int32),
    )
    o, lse = mosaic_forward.forward(plan, blocks, kv_length, inputs)
    return o[:, :q_length], lse[:, :, :q_length].swapaxes(1, 2)


def _backward(plan: Plan, trained: tuple, fixed: triton.Fixed, lse: Array, delta: Array, do: Array):
    q, k, v, _ = trained
    tuning = mosaic_tuning(q.shape[3])
    if isinstance(tuning, GpuBlocks):
        return triton.backward(plan, trained, fixed, lse, delta, do)
    lengths = q_length, kv_length = q.shape[1], k.shape[1]

    def inputs(blocks: GpuBlocks, side: int) -> mosaic_backward.Inputs:
        return mosaic_backward.Inputs(
            q=pad(q, 1, blocks.q),
            k=pad(k, 1, blocks.kv),
            v=pad(v, 1, blocks.kv),
            do=pad(do, 1, blocks.q),
            lse=pad(lse.swapaxes(1, 2), 2, blocks.q, triton.NEVER),
            delta=pad(delta.swapaxes(1, 2), 2, blocks.q),
            visits=_visits(plan, blocks, fixed, lengths)[side],
            offsets=jnp.asarray(fixed.offsets, jnp.int32),
        )

    dq = mosaic_backward.backward_q(plan, tuning.dq, kv_length, inputs(tuning.dq, 0))
    dk, dv = mosaic_backward.backward_kv(plan, tuning.dkv, kv_length, inputs(tuning.dkv, 1))
    return dq[:, :q_length], dk[:, :kv_length], dv[:, :kv_length], None


_attend = differentiable(_forward, _backward)
