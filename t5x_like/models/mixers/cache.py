"""The decode state of attention: keys and values of past tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Cache(NamedTuple):
    """Preallocated keys and values of a layer; those of layers that are scanned have a leading dim more."""

    key: Float[Array, "*layers batch max_length kv_heads head_dim"]
    value: Float[Array, "*layers batch max_length kv_heads v_dim"]


def empty_cache(batch: int, max_length: int, dtype: str, shapes: Sequence[tuple[int, int]]) -> Cache:
    """A cache without tokens; `shapes` are (heads, head_dim) of keys and of values."""
    return Cache(*(jnp.zeros((batch, max_length, *shape), dtype) for shape in shapes))
