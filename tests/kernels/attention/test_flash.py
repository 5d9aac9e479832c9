"""What the backward pass keeps of the forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from t5x_like.kernels.attention import RelativeBias, attention
from t5x_like.kernels.target import compiling_for

SHAPE = (2, 128, 4, 64)


def layer(backend, relative_bias=False):
    """Attention and an output projection, whose gradient needs what attention gives."""
    table = jnp.zeros((4, 32)) if relative_bias else None

    def function(q, k, v, out):
        bias = None if table is None else (RelativeBias(), table)
        o = attention(q, k, v, relative_bias=bias, backend=backend)
        return jnp.sum(jnp.einsum("btnh,nhd->btd", o, out).astype(jnp.float32) ** 2)

    policy = jax.checkpoint_policies.save_only_these_names("attention")
    return jax.checkpoint(function, policy=policy), [jnp.ones(SHAPE, jnp.bfloat16)] * 3 + [jnp.ones((4, 64, 8))]


@pytest.mark.parametrize("relative_bias", [False, True])
@pytest.mark.parametrize("backend", ["reference", "chunked", "tpu"])
def test_its_output_is_kept_once_by_name(backend, relative_bias):
    function, arrays = layer(backend, relative_bias)
    with compiling_for("v5e"):
        kept = [array for array, why in saved_residuals(function, *arrays) if "argument" not in why]
    assert [array.size for array in kept if array.size >= np.prod(SHAPE)] == [np.prod(SHAPE)]


def test_with_its_name_kept_the_forward_kernel_is_not_needed_again():
    """What is recomputed still holds the kernel, but nothing reads its results, so the compiler drops it."""
    function, arrays = layer("tpu")
    with compiling_for("v5e"):
        program = jax.make_jaxpr(jax.grad(function, argnums=(0, 1, 2, 3)))(*arrays)
    (recomputed,) = (equation.params["jaxpr"] for equation in program.eqns if equation.primitive.name == "remat2")
    read = [id(variable) for equation in recomputed.eqns for variable in equation.invars] + list(
        map(id, recomputed.outvars)
    )
    kernels = [equation for equation in recomputed.eqns if equation.primitive.name == "pallas_call"]
    is_read = [any(id(variable) in read for variable in equation.outvars) for equation in kernels]
    assert is_read[-1]  # the backward kernel
    assert not any(is_read[:-1])
