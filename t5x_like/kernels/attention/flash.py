"""What all backends with O(T) memory share: the derivative from (output, log-sum-exp), and sinks.

With p = exp(logits - lse) the gradient of the logits is p * (do v^T - delta), where delta is sum(o * do), less the
gradient of lse (Dao 2023, section 2.3). So the output and one number per query are all that is kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_like.kernels.attention.logits import MASK_VALUE


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Joins a forward and a backward pass to one function (plan, trained, fixed) -> (o, lse).

    Args:
      forward: (plan, trained, fixed) -> (o [batch heads length v_dim], lse [batch heads length]); lse is MASK_VALUE and
        o is zero in rows without keys.
      backward: (plan, trained, fixed, lse, delta, do) -> gradients of `trained`; its lse is 0 in rows without keys, so
        that exp(MASK_VALUE - lse) is 0.

    `plan` is static and hashable, `trained` a tuple of arrays that have gradients, `fixed` a pytree of arrays that
    have none.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(plan: Any, trained: tuple, fixed: Any):
        return forward(plan, trained, fixed)

    def attend_forward(plan, trained, fixed):
        o, lse = forward(plan, trained, fixed)
        o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
        return (o, lse), (trained, fixed, o, lse)

    def attend_backward(plan, saved, gradients):
        trained, fixed, o, lse = saved
        do, dlse = gradients
        delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
        lse = jnp.where(lse > MASK_VALUE / 2, lse, 0)
        return backward(plan, trained, fixed, lse, delta, do), None

    attend.defvjp(attend_forward, attend_backward)
    return attend


def add_sinks(
    o: Float[Array, "batch heads length v_dim"],
    lse: Float[Array, "batch heads length"],
    sinks: Float[Array, "heads"],
) -> tuple[Float[Array, "batch heads length v_dim"], Float[Array, "batch heads length"]]:
    """Attention with one more logit per head in the denominator, from attention without it."""
    with_sinks = jnp.logaddexp(lse, sinks.astype(jnp.float32)[:, None])
    return (o * jnp.exp(lse - with_sinks)[..., None]).astype(o.dtype), with_sinks
