"""Inside `jax.shard_map`: which mesh axes arrays vary over, made alike where a function needs it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array


def axes_varied(arrays: tuple[Array, ...]) -> frozenset[str]:
    """Mesh axes that at least one of the arrays varies over."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def vary_alike(*arrays: Array) -> list[Array]:
    """Marks all arrays as varying over each mesh axis that one of them varies over.

    The transpose of that mark sums a gradient over the axes: so a matrix that all devices share gets one gradient.
    """
    return [vary_over(array, axes_varied(arrays)) for array in arrays]


def vary_over(array: Array, axes: frozenset[str]) -> Array:
    missing = axes - axes_varied((array,))
    return lax.pcast(array, tuple(missing), to="varying") if missing else array


def zeros_varying_like(shape: tuple[int, ...], dtype: DTypeLike, arrays: tuple[Array, ...]) -> Array:
    """Zeros to begin a loop with that adds to them what is made of `arrays`."""
    return vary_over(jnp.zeros(shape, dtype), axes_varied(arrays))


def shape_varying_like(shape: tuple[int, ...], dtype: DTypeLike, arrays: tuple[Array, ...]) -> jax.ShapeDtypeStruct:
    """What a Pallas kernel makes of `arrays`."""
    varying = jax.sharding.ManualAxisType(varying=axes_varied(arrays))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
