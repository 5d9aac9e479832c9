"""Memory of programs small enough to count by hand, and of one that XLA compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.planning.liveness import peak_bytes, sharded_size

WHOLE = lambda aval: math.prod(aval.shape) * aval.dtype.itemsize
X = np.ones((64, 64), np.float32)
SIZE = X.nbytes


def test_a_chain_of_products_needs_two_arrays():
    assert peak_bytes(jax.make_jaxpr(lambda x: x @ x @ x @ x @ x)(X), WHOLE) == 2 * SIZE


def test_elementwise_work_is_done_inside_its_reader():
    assert peak_bytes(jax.make_jaxpr(lambda x: jnp.sin(x * 2 + 1) @ x)(X), WHOLE) == SIZE


def test_what_is_read_twice_is_kept():
    def both(x):
        y = jnp.sin(x)
        return y @ x + y

    assert peak_bytes(jax.make_jaxpr(both)(X), WHOLE) == 2 * SIZE


def test_donated_results_cost_nothing():
    program = jax.make_jaxpr(lambda x: (x + 1, x @ x))(X)
    assert peak_bytes(program, WHOLE) == 2 * SIZE
    assert peak_bytes(program, WHOLE, donated=1) == SIZE


def test_a_loop_keeps_what_the_backward_pass_reads():
    """Of ten layers' inputs and sines; XLA agrees."""

    def loss(x, w):
        return jnp.sum(jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=10)[0])

    gradient = jax.grad(loss)
    compiled = jax.jit(gradient).lower(X, X).compile().memory_analysis()
    xla = compiled.temp_size_in_bytes + compiled.output_size_in_bytes
    assert peak_bytes(jax.make_jaxpr(gradient)(X, X), WHOLE) == pytest.approx(xla, rel=0.2)
    checkpointed = jax.grad(jax.checkpoint(loss))
    assert peak_bytes(jax.make_jaxpr(checkpointed)(X, X), WHOLE) >= 10 * SIZE


def test_sizes_on_a_mesh():
    mesh = {"data": 2, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 2}
    size = sharded_size(mesh, {16}, {128}, {512}, {(512, 64): 999})
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    assert size(shape(16, 128, 64)) == 16 * 128 * 64 * 4 // 8
    assert size(shape(16 * 128, 512)) == 16 * 128 * 512 * 4 // 16
    assert size(shape(512, 64)) == 999
    assert size(shape(512, 64, dtype=jnp.bfloat16)) == 512 * 64 * 2 // 2
    assert size(shape(7)) == 28
