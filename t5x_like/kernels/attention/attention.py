"""The one way into attention, and the table of its backends."""

import jax
from jaxtyping import Array, Float

from t5x_like.kernels.attention import capabilities
from t5x_like.kernels.attention.call import AttentionCall, call_of
from t5x_like.kernels.attention.reference import reference_attention
from t5x_like.kernels.backends import Backend, choose


def _tpu(call: AttentionCall) -> tuple[Array, Array]:
    from t5x_like.kernels.attention.tpu import tpu_attention  # Pallas takes long to import

    return tpu_attention(call)


def _mosaic_gpu(call: AttentionCall) -> tuple[Array, Array]:
    from t5x_like.kernels.attention.mosaic import mosaic_attention

    return mosaic_attention(call)


def _triton(call: AttentionCall) -> tuple[Array, Array]:
    from t5x_like.kernels.attention.triton import triton_attention

    return triton_attention(call)


def _cudnn(call: AttentionCall) -> tuple[Array, None]:
    from t5x_like.kernels.attention.cudnn import cudnn_attention

    return cudnn_attention(call)


def _chunked(call: AttentionCall) -> tuple[Array, Array]:
    from t5x_like.kernels.attention.chunked import chunked_attention

    return chunked_attention(call)


BACKENDS: dict[str, Backend] = {
    "tpu": Backend(_tpu, capabilities.tpu_refusal),
    "mosaic_gpu": Backend(_mosaic_gpu, capabilities.mosaic_gpu_refusal, capabilities.mosaic_gpu_reserve),
    "triton": Backend(_triton, capabilities.triton_refusal),
    "cudnn": Backend(_cudnn, capabilities.cudnn_refusal),
    "reference": Backend(reference_attention, capabilities.reference_refusal, capabilities.reference_reserve),
    "chunked": Backend(_chunked, capabilities.chunked_refusal),
}
"""All backends by name: `backend="auto"` takes the first that has neither refusal nor reserve.

Each returns the output and the log-sum-exp, the latter at least where it is asked for.
"""


def attend(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"] | None]:
    """The output of a call, and its log-sum-exp, at least where it is wanted.

    Raises:
      UserError: if shapes do not fit, or the backend is unknown or cannot do what is asked.
    """
    call.check()
    slopes = None if call.alibi_slopes is None else jax.lax.stop_gradient(call.alibi_slopes)
    call = call.replace(alibi_slopes=slopes, scale=call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    return choose("attention", BACKENDS, call.backend, call).run(call)


def attention(
    q: Float[Array, "batch q_length heads head_dim"],
    k: Float[Array, "batch kv_length kv_heads head_dim"],
    v: Float[Array, "batch kv_length kv_heads v_dim"],
    **fields,
) -> (
    Float[Array, "batch q_length heads v_dim"]
    | tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]
):
    """`attend` to a call with these fields (see `call_of`): the output, with `return_lse` the log-sum-exp beside it."""
    call = call_of(q, k, v, **fields)
    o, lse = attend(call)
    return (o, lse) if call.return_lse else o
