"""The attention logits: one definition for every backend."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
"""Logit of a key that is not allowed: finite, so that differences of two of them are never NaN."""


def attention_logits(
    products: Float[Array, "... q_length kv_length"],
    allowed: Bool[Array, "... #q_length #kv_length"],
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "... q_length kv_length"]:
    """Products of queries and keys (float32) to logits: scale, then soft-cap (Gemma 2, section 2), then mask."""
    logits = products * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return jnp.where(allowed, logits, MASK_VALUE)
