"""Arrays in whole blocks."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def pad(array: Array, axis: int, multiple: int, value: float | Literal["edge"] = 0) -> Array:
    """`array` with `axis` brought to a multiple of `multiple`, by `value`, or by its last entry ("edge")."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.pad(array, widths, mode="edge") if value == "edge" else xp.pad(array, widths, constant_values=value)
