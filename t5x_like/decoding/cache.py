"""Keys and values of past tokens, and attention over them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.door import attention
from t5x_like.models.attention import Attend
from t5x_like.models.transformer import DecoderConfig


class Cache(NamedTuple):
    """Preallocated keys and values of all layers, or, inside the layers' loop, of one (without the leading dim)."""

    key: Float[Array, "layers batch max_length kv_heads head_dim"]
    value: Float[Array, "layers batch max_length kv_heads head_dim"]


def empty_cache(config: DecoderConfig, batch_size: int, max_length: int) -> Cache:
    attention = config.stack.block.attention
    shape = (
        config.stack.num_layers,
        batch_size,
        max_length,
        attention.kv_heads,
        attention.head_size(config.d_model),
    )
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def attend_cached(index: Int[Array, ""], start: Int[Array, "batch"], max_length: int) -> Attend:
    """Writes the new keys and values at `index` and attends over the cache up to each new token.

    Args:
      index: where in the cache the first new token stands, the same for all rows.
      start: where each row's text begins; what stands before is padding on the left.
      max_length: of the cache.
    """
    kv_index = jnp.broadcast_to(jnp.arange(max_length, dtype=jnp.int32), (start.shape[0], max_length))

    def attend(q, k, v, state: Cache, **options):
        state = Cache(
            lax.dynamic_update_slice_in_dim(state.key, k.astype(state.key.dtype), index, axis=1),
            lax.dynamic_update_slice_in_dim(state.value, v.astype(state.value.dtype), index, axis=1),
        )
        q_index = jnp.broadcast_to(index + jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
        written = lambda positions: (positions >= start[:, None]).astype(jnp.int32)
        o = attention(
            q,
            state.key,
            state.value,
            segment_ids=(written(q_index), written(kv_index)),
            positions=(q_index, kv_index),
            **options,
        )
        return o, state

    return attend
