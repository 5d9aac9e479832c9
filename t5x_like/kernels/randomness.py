"""Random numbers of a batch: from one key, or each row's from a key of its own.

With keys of their own, rows get the same numbers whichever others they are computed with: in a microbatch, on a stage.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray

Keys = Key[Array, "..."]
"""One key, or one per row."""


def row_keys(key: PRNGKeyArray, num_rows: int) -> Key[Array, "rows"]:
    """A key for each row: [num_rows]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))


def split_keys(key: Keys, count: int) -> list[Keys]:
    """So many keys, each of the shape of `key`: a single one, or one per row."""
    split = lambda key: jax.random.split(key, count)
    return list(split(key) if key.ndim == 0 else jax.vmap(split, out_axes=1)(key))


def fold_in(key: Keys, number: Int[Array, ""] | int) -> Keys:
    """The key, or each row's, for the thing with this number."""
    return jax.random.fold_in(key, number) if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(key, number)


def keep(key: Keys, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """What dropout keeps of an array [batch, ...] of this shape: each element with probability 1 - rate."""
    return _by_row(key, shape, lambda key, shape: jax.random.bernoulli(key, 1 - rate, shape))


def uniform(key: Keys, shape: tuple[int, ...], low: float, high: float) -> Array:
    """An array [batch, ...] of numbers in [low, high)."""
    return _by_row(key, shape, lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high))


def _by_row(key, shape, draw):
    return draw(key, shape) if key.ndim == 0 else jax.vmap(lambda key: draw(key, shape[1:]))(key)
