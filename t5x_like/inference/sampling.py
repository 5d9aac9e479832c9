"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: keeps the k most likely tokens; None: all.
      top_p: then keeps the smallest set of most likely tokens whose probabilities reach p (nucleus sampling, Holtzman
        et al. 2020); None: all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or positive.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be in (0, 1].")


def sample(logits: Float[Array, "batch vocab"], keys: PRNGKeyArray, sampling: Sampling) -> Int[Array, "batch"]:
    """Draws one token per row; `keys` holds one key per row, so that a row's draw does not depend on the others."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def restrict(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Float[Array, "batch vocab"]:
    """Sets the logits of tokens outside top-k and top-p to -inf; ties at the border of top-k stay."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        sorted_probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # A token stays while the more likely ones before it have not yet reached p; the first always stays.
        keep_sorted = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs < sampling.top_p
        keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits
