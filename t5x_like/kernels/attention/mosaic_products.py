"""The matrix products of the Mosaic GPU kernels, and what its interpreter has instead of them.

The interpreter has copies, barriers and threads, but of the products of the matrix units neither those of turned
operands, nor those of operands in registers, nor those that are added to something.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float


def interpretation(wanted: bool) -> Any:
    """The `interpret` argument of `plgpu.kernel`."""
    if not wanted:
        return None
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.11 on

    return InterpretGPUParams(detect_races=True)


def transposed_product(a: Any, b: Any, interpreted: bool) -> Float[Array, "rows columns"]:
    """`a b^T`, both in shared memory, with float32 sums."""
    if interpreted:
        return lax.dot_general(a[...], _read(b), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def multiply(sums):
        plgpu.wgmma(sums, a, b.T)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(
    total: Float[Array, "rows columns"], a: Array, b: Any, interpreted: bool
) -> Float[Array, "rows columns"]:
    """`total + a b`, with `a` in registers and `b` in shared memory."""
    if interpreted:
        return total + lax.dot(a, _read(b), preferred_element_type=jnp.float32)
    return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(total))


def _read(ref: Any) -> Array:
    """Shared memory, read before any copy to it that comes after; the matrix units' own reads need no such fence."""
    values = ref[...]
    plgpu.commit_smem()
    return values
