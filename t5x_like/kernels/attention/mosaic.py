"""Attention on Hopper GPUs: prepares arrays for the Mosaic GPU kernels in mosaic_forward.py and mosaic_backward.py.

At head_dim 256 the backward pass is that of Triton.
"""

from jaxtyping import Array, Float

from t5x_like.kernels.attention import mosaic_backward, mosaic_forward, triton
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.flash import differentiable
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks, mosaic_tuning
from t5x_like.kernels.attention.prepared import Fixed, Inputs, Plan
from t5x_like.kernels.attention.triton_tiles import Context


def mosaic_attention(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads head_dim"], Float[Array, "batch q_length heads"]]:
    """Attention by Pallas kernels."""
    return triton.run(_attend, call)


def _inputs(plan: Plan, blocks: GpuBlocks, trained: tuple, fixed: Fixed, **others) -> Inputs:
    """As the Triton kernels', without what only they read: keys that pad are told from others by their number."""
    inputs = triton.inputs_in_blocks(plan, blocks, trained, fixed, None, **others)
    return inputs._replace(context=Context(inputs.context.visits, inputs.context.offsets))


def _forward(plan: Plan, trained: tuple, fixed: Fixed):
    q, k, _, _ = trained
    tuning = mosaic_tuning(q.shape[3])
    blocks = tuning if isinstance(tuning, GpuBlocks) else tuning.forward
    o, lse = mosaic_forward.forward(plan, blocks, k.shape[1], _inputs(plan, blocks, trained, fixed, side=0))
    return o[:, : q.shape[1]], lse[:, :, : q.shape[1]].swapaxes(1, 2)


def _backward(plan: Plan, trained: tuple, fixed: Fixed, lse: Array, delta: Array, do: Array):
    q_length, kv_length, tuning = trained[0].shape[1], trained[1].shape[1], mosaic_tuning(trained[0].shape[3])
    if isinstance(tuning, GpuBlocks):
        return triton.backward(plan, trained, fixed, lse, delta, do)
    inputs = lambda blocks, side: _inputs(plan, blocks, trained, fixed, side=side, outer=(do, lse, delta))
    dq = mosaic_backward.backward_q(plan, tuning.dq, kv_length, inputs(tuning.dq, 0))
    dk, dv = mosaic_backward.backward_kv(plan, tuning.dkv, kv_length, inputs(tuning.dkv, 1))
    return dq[:, :q_length], dk[:, :kv_length], dv[:, :kv_length], None


_attend = differentiable(_forward, _backward)
