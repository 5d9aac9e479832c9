"""The attention logits: one definition for every backend."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
"""Logit of a key that is not allowed: finite, so that differences of two of them are never NaN."""


def attention_logits(
    products: Float[Array, "... q_length kv_length"],
    allowed: Bool[Array, "... #q_length #kv_length"] | None = None,
    bias: Float[Array, "... #q_length #kv_length"] | None = None,
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "... q_length kv_length"]:
    """Products of queries and keys (float32) to logits: scale, bias, soft-cap (Gemma 2, section 2), and last the mask.

    `allowed` None is no mask.
    """
    logits = products * scale
    if bias is not None:
        logits = logits + bias
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits if allowed is None else jnp.where(allowed, logits, MASK_VALUE)


def through_soft_cap(
    gradient: Float[Array, "..."], logits: Float[Array, "..."], soft_cap: float | None
) -> Float[Array, "..."]:
    """The gradient of `attention_logits` by scaled products plus bias, given that by its result `logits`.

    `gradient` must be 0 where the mask forbids; there it stays 0.
    """
    if soft_cap is None:
        return gradient
    capped = jnp.maximum(logits, -soft_cap)  # the mask's value would square to infinity
    return gradient * (1 - (capped / soft_cap) ** 2)
