"""The one way into attention, and the table of what each backend can do."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.attention.reference import reference_attention


@dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    Attributes:
      run: the implementation.
      refusal: why it cannot do a call, in words that follow "because"; None if it can.
    """

    run: Callable[[AttentionCall], Array]
    refusal: Callable[[AttentionCall], str | None]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(run=reference_attention, refusal=lambda call: None),
}
"""All backends by name: `backend="auto"` takes the first that does not refuse."""


def attention(
    q: Float[Array, "batch q_length heads head_dim"],
    k: Float[Array, "batch kv_length kv_heads head_dim"],
    v: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    mask: MaskSpec = MaskSpec(),
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None = None,
    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    backend: str = "auto",
) -> Float[Array, "batch q_length heads head_dim"]:
    """Multi-head attention: softmax(soft_cap(scale * q k^T) + mask) v, differentiable in q, k and v.

    A query that may attend to nothing gives zeros and takes part in no gradient.

    Args:
      q: queries, in the order of their key heads: `heads / kv_heads` neighbours share one key head (GQA, MQA).
      k: keys.
      v: values.
      mask: rule on positions.
      segment_ids: of queries and keys: attention stays within a segment, and segment 0 is padding.
      positions: of queries and keys, the order that `mask` is about; by default both count from 0.
      scale: factor on the products, by default head_dim ** -0.5.
      soft_cap: the logits become `soft_cap * tanh(logits / soft_cap)`, before the mask.
      dropout_rate: share of the attention probabilities set to 0; the others are divided by the rest.
      dropout_key: random key for it.
      backend: a name in BACKENDS, or "auto".

    Raises:
      UserError: if shapes do not fit, or the backend is unknown or cannot do what is asked.
    """
    if positions is None:
        positions = (jnp.arange(q.shape[1])[None], jnp.arange(k.shape[1])[None])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = AttentionCall(q, k, v, mask, positions, segment_ids, scale, soft_cap, dropout_rate, dropout_key)
    return BACKENDS[_choose(backend, call)].run(call)


def _choose(backend: str, call: AttentionCall) -> str:
    refusals = {name: entry.refusal(call) for name, entry in BACKENDS.items()}
    if backend == "auto":
        name = next(name for name, refusal in refusals.items() if refusal is None)
        passed_over = [f"{other} because {refusal}" for other, refusal in refusals.items() if refusal is not None]
        _log_once(f"attention: {name}, the first backend that can do it. Not: {'; '.join(passed_over) or 'none'}.")
        return name
    if backend not in BACKENDS:
        raise UserError(f"attention: there is no backend {backend!r}: choose from auto, {', '.join(BACKENDS)}.")
    if refusals[backend] is not None:
        able = [name for name, refusal in refusals.items() if refusal is None]
        raise UserError(f"attention: backend {backend!r} cannot, because {refusals[backend]}. Use {', '.join(able)}.")
    _log_once(f"attention: {backend}, as asked for.")
    return backend


@functools.cache
def _log_once(message: str):
    logging.info(message)
