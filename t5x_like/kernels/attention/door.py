"""The one way into attention, and the table of its backends."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention import capabilities
from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.attention.reference import reference_attention
from t5x_like.kernels.backends import Backend, choose

Side = int | Int[Array, ""] | Int[Array, "#batch length"]
"""Positions of the queries or of the keys: each one, or the first of consecutive ones."""


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


def attention(
    q: Float[Array, "batch q_length heads head_dim"],
    k: Float[Array, "batch kv_length kv_heads head_dim"],
    v: Float[Array, "batch kv_length kv_heads v_dim"],
    *,
    mask: MaskSpec = MaskSpec(),
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None = None,
    positions: tuple[Side, Side] | None = None,
    relative_bias: tuple[RelativeBias, Float[Array, "heads num_buckets"]] | None = None,
    alibi_slopes: Float[Array, "heads"] | None = None,
    bias: Float[Array, "#batch #heads #q_length #kv_length"] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> (
    Float[Array, "batch q_length heads v_dim"]
    | tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]
):
    """Multi-head attention: softmax(soft_cap(scale * q k^T + biases) + mask) v.

    Differentiable in q, k, v, the table of the relative bias, bias and sinks. A query that may attend to nothing gives
    zeros and takes part in no gradient.

    Args:
      q: queries, in the order of their key heads: `heads / kv_heads` neighbours share one key head (GQA, MQA).
      k: keys.
      v: values; their head_dim may differ.
      mask: rules on positions.
      segment_ids: of queries and keys: attention stays within a segment, and segment 0 is padding.
      positions: of queries and keys, the order that `mask`, `relative_bias` and `alibi_slopes` are about. A single
        number stands for consecutive positions from there on. By default both count from 0; that serves packed rows
        too, where only differences within a segment matter (but not `mask.prefix` and `mask.chunk`).
      relative_bias: T5's (Raffel et al. 2020, section 2.1): its buckets, and their parameters.
      alibi_slopes: of ALiBi (Press et al. 2022): minus slope * distance is added; no gradient flows to them.
      bias: any other, added to the logits before the soft-cap. Costs memory in proportion to the scores.
      sinks: one more logit per head in the softmax, without a value (gpt-oss).
      scale: factor on the products, by default head_dim ** -0.5.
      soft_cap: the logits become `soft_cap * tanh(logits / soft_cap)`, before the mask.
      dropout_rate: share of the attention probabilities set to 0; the others are divided by the rest.
      dropout_key: random key for it, or one per row; which probabilities it drops depends on the backend.
      return_lse: returns the natural logarithm of the softmax's denominator too, in float32; a large negative number
        (`logits.MASK_VALUE`) in a row without keys.
      backend: a name in BACKENDS, or "auto", which never keeps more than `capabilities.AUTO_MAX_SCORES` scores, except
        for a bias of that size.

    Raises:
      UserError: if shapes do not fit, or the backend is unknown or cannot do what is asked.
    """
    if positions is None:
        positions = (0, 0)
    offsets = positions if all(jnp.ndim(side) == 0 for side in positions) else None
    positions = (_positions(positions[0], q.shape[1]), _positions(positions[1], k.shape[1]))
    alibi_slopes = None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        mask=mask,
        positions=positions,
        offsets=offsets,
        segment_ids=segment_ids,
        relative_bias=relative_bias,
        alibi_slopes=alibi_slopes,
        bias=bias,
        sinks=sinks,
        scale=scale,
        soft_cap=soft_cap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_lse=return_lse,
    )
    o, lse = choose("attention", BACKENDS, backend, call).run(call)
    return (o, lse) if return_lse else o


def _positions(side: Side, length: int) -> Int[Array, "#batch length"]:
    return (side + jnp.arange(length))[None] if jnp.ndim(side) == 0 else side
