"""The matrix product inside kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Float[Array, "..."]:
    """Matrix product over the given dims, with float32 out; float32 in is multiplied as such."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision=precision)
