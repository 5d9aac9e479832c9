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

NAME = "attention"
"""By which rematerialisation may keep what spares it the forward pass: what is named is all that is kept of it."""


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Joins a forward and a backward pass to one function (plan, trained, fixed, sinks) -> (o, lse).

    Args:
      forward: (plan, trained, fixed) -> (o [... v_dim], lse [...]); lse is MASK_VALUE and o is zero in rows without
        keys. Where `trained` has a table or there are sinks, o is best left in float32.
      backward: (plan, trained, fixed, lse, delta, do) -> gradients of `trained`; its lse is 0 in rows without keys, so
        that exp(MASK_VALUE - lse) is 0.

    `plan` is static and hashable, `trained` the queries, keys, values and the table of the relative bias or None,
    `fixed` a pytree of arrays that have no gradients; `sinks` broadcast to lse, or None.
    """

    def run(plan: Any, trained: tuple, fixed: Any, sinks: Array | None) -> tuple[Array, Array]:
        o, lse = forward(plan, trained, fixed)
        return (o, lse) if sinks is None else add_sinks(o, lse, sinks)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(plan: Any, trained: tuple, fixed: Any, sinks: Array | None):
        o, lse = run(plan, trained, fixed, sinks)
        return o.astype(trained[2].dtype), lse

    def attend_forward(plan, trained, fixed, sinks):
        o, lse = run(plan, trained, fixed, sinks)
        if trained[3] is None:
            o = o.astype(trained[2].dtype)
        # Else it is kept as exact as it is: its rounding would be one error, through delta, in the gradients of all
        # logits of a row, and sums over many keys, as in the table's gradient, would not average it out.
        o, lse = checkpoint_name(o, NAME), checkpoint_name(lse, NAME)
        return (o.astype(trained[2].dtype), lse), (trained, fixed, sinks, o, lse)

    def attend_backward(plan, residuals, gradients):
        trained, fixed, sinks, o, lse = residuals
        do, dlse = gradients
        delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
        dsinks = None
        if sinks is not None:
            # Of logits whose values are zero; `vjp` sums them to the shape of `sinks`.
            spread, pull = jax.vjp(lambda sinks: jnp.broadcast_to(sinks.astype(jnp.float32), lse.shape), sinks)
            (dsinks,) = pull(-delta * jnp.exp(spread - lse))
        lse = jnp.where(lse > MASK_VALUE / 2, lse, 0)
        return backward(plan, trained, fixed, lse, delta, do), None, dsinks

    attend.defvjp(attend_forward, attend_backward)
    return lambda plan, trained, fixed, sinks=None: attend(plan, trained, fixed, sinks)


def add_sinks(
    o: Float[Array, "... v_dim"], lse: Float[Array, "..."], sinks: Float[Array, "..."]
) -> tuple[Float[Array, "... v_dim"], Float[Array, "..."]]:
    """Attention with one more logit in the denominator, from attention without it; `sinks` broadcast to `lse`."""
    with_sinks = jnp.logaddexp(lse, sinks.astype(jnp.float32))
    return (o * jnp.exp(lse - with_sinks)[..., None]).astype(o.dtype), with_sinks
