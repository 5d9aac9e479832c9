"""The one way into grouped matrix products, and the table of their backends."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.backends import Backend, choose
from t5x_like.kernels.grouped_matmul.products import differentiable
from t5x_like.kernels.grouped_matmul.tile_sizes import gpu_tuning, tpu_tuning
from t5x_like.kernels.target import interpreted, target_chip, target_platform
from t5x_like.kernels.tuning import vmem_limit_bytes, vmem_mib
from t5x_like.kernels.varying import vary_alike


class Call(NamedTuple):
    """The arguments of `grouped_matmul`, checked."""

    lhs: Float[Array, "m k"]
    rhs: Float[Array, "g k n"]
    group_sizes: Int[Array, "g"]
    expected_rows: int

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.lhs, self.rhs, self.group_sizes


def _tpu(call: Call) -> Array:
    from t5x_like.kernels.grouped_matmul.tpu import PRODUCTS, Plan  # Pallas takes long to import

    chip = target_chip()
    plan = Plan(tpu_tuning(chip), vmem_limit_bytes(vmem_mib(chip)), call.expected_rows)
    return differentiable(PRODUCTS, plan, *call.arrays)


def _triton(call: Call) -> Array:
    from t5x_like.kernels.grouped_matmul.triton import PRODUCTS, Plan

    plan = Plan(gpu_tuning(target_chip()), interpreted(), call.expected_rows)
    return differentiable(PRODUCTS, plan, *call.arrays)


def _reference(call: Call) -> Array:
    from t5x_like.kernels.grouped_matmul.plain import reference

    return reference(*call.arrays)


def _chunked(call: Call) -> Array:
    from t5x_like.kernels.grouped_matmul.plain import CHUNKED

    return differentiable(CHUNKED, None, *call.arrays)


def tpu_refusal(call: Call) -> str | None:
    if target_platform() != "tpu":
        return f"it runs on TPU, and this program is for {target_chip()}"
    return _dtype_refusal(call, ("bfloat16", "float32"))


def triton_refusal(call: Call) -> str | None:
    if target_platform() != "gpu":
        return f"it runs on GPU, and this program is for {target_chip()}"
    return _dtype_refusal(call, ("bfloat16", "float16", "float32"))


def _dtype_refusal(call: Call, dtypes: tuple[str, ...]) -> str | None:
    name = call.lhs.dtype.name
    return None if name in dtypes else f"it needs {' or '.join(dtypes)}, and was given {name}"


def kernel_reserve(call: Call) -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    split = any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return "on several devices it has to be inside jax.shard_map" if split else None


def reference_reserve(call: Call) -> str | None:
    return None if target_platform() == "tpu" else "away from TPU its work and memory grow with the number of groups"


BACKENDS: dict[str, Backend] = {
    "tpu": Backend(_tpu, tpu_refusal, kernel_reserve),
    "triton": Backend(_triton, triton_refusal, kernel_reserve),
    "reference": Backend(_reference, reserve=reference_reserve),
    "chunked": Backend(_chunked),
}
"""All backends by name: `backend="auto"` takes the first that has neither refusal nor reserve."""


def grouped_matmul(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "g k n"],
    group_sizes: Int[Array, "g"],
    *,
    expected_rows: int | None = None,
    backend: str = "auto",
) -> Float[Array, "m n"]:
    """Multiplies each row by the matrix of its group: the first group_sizes[0] rows by rhs[0], the next by rhs[1], ...

    Products are summed in float32; the result has the dtype of `lhs`. Differentiable in lhs and rhs. Rows beyond the
    sum of `group_sizes` give zeros and take part in no gradient; a group may be empty.

    Args:
      lhs: rows, those of a group together, in the order of the groups.
      rhs: a matrix per group, of the same dtype.
      group_sizes: rows of each group; their sum is at most m.
      expected_rows: about what that sum will be, from which the compiler estimates the kernels' time; None: m.
      backend: a name in BACKENDS, or "auto".

    Raises:
      UserError: if shapes or dtypes do not fit, or the backend is unknown or cannot do what is asked.
    """
    _check(lhs, rhs, group_sizes)
    rows = len(lhs) if expected_rows is None else min(expected_rows, len(lhs))
    call = Call(*vary_alike(*map(jnp.asarray, (lhs, rhs, group_sizes))), rows)
    return choose("grouped_matmul", BACKENDS, backend, call).run(call)


def _check(lhs: Array, rhs: Array, group_sizes: Array):
    fits = lhs.ndim == 2 and rhs.ndim == 3 and lhs.shape[1] == rhs.shape[1] and group_sizes.shape == rhs.shape[:1]
    if not fits or not lhs.size or not rhs.size:
        raise UserError(
            f"grouped_matmul: lhs {lhs.shape}, rhs {rhs.shape} and group_sizes {group_sizes.shape} do not fit: give "
            "[m, k], [g, k, n] and [g], none of them empty."
        )
    if lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        raise UserError(
            f"grouped_matmul: lhs is {lhs.dtype} and rhs is {rhs.dtype}: cast both to one floating-point type."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise UserError(f"grouped_matmul: group_sizes is {group_sizes.dtype}: give integers.")
