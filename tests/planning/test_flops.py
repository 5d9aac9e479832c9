"""FLOPs of a traced program against XLA's own count of the compiled one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from t5x_like.kernels.grouped_matmul import grouped_matmul
from t5x_like.kernels.target import compiling_for
from t5x_like.planning.flops import count_flops

X, W = np.ones((64, 32), np.float32), np.ones((32, 48), np.float32)


def test_products_and_their_gradients_agree_with_xla():
    loss = lambda x, w: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w.T))
    gradient = jax.grad(loss, argnums=(0, 1))
    xla = jax.jit(gradient).lower(X, W).compile().cost_analysis()["flops"]
    assert count_flops(jax.make_jaxpr(gradient)(X, W)) == pytest.approx(xla, rel=0.02)


def test_loops_count_all_turns_and_recomputation_counts():
    def loss(x, w):
        step = jax.checkpoint(lambda x, _: (jnp.sin(x @ w @ w.T), None))
        return jnp.sum(jax.lax.scan(step, x, None, length=5)[0])

    once = 2 * 64 * 32 * 48
    forward = count_flops(jax.make_jaxpr(loss)(X, W))
    assert forward == 5 * 2 * once
    # Backward twice the forward pass, and the forward pass once more.
    assert count_flops(jax.make_jaxpr(jax.grad(loss))(X, W)) >= 3 * forward - 2 * once


def test_a_loop_over_data_counts_half_of_the_loop_around_it():
    def attend(x):
        row = lambda i, x: jax.lax.fori_loop(0, i, lambda j, x: x @ x, x)
        return jax.lax.scan(lambda x, i: (row(i, x), None), x, jnp.arange(8))[0]

    assert count_flops(jax.make_jaxpr(attend)(np.ones((4, 4)))) == 8 * 4.5 * 2 * 4**3


def test_a_manual_body_counts_on_all_its_devices():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    spec = PartitionSpec("a")
    product = lambda x: jax.shard_map(lambda x: x @ W, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"a"})(x)
    assert count_flops(jax.make_jaxpr(product)(X)) == 2 * 64 * 32 * 48


def test_of_a_condition_the_most_expensive_branch():
    choose = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: jnp.sum(x @ W @ W.T), lambda: 0.0)
    assert count_flops(jax.make_jaxpr(choose)(X)) == 2 * 2 * 64 * 32 * 48


def test_grouped_products_count_the_rows_that_are_expected():
    lhs, rhs, sizes = (jax.ShapeDtypeStruct(*a) for a in (((512, 128), "f4"), ((4, 128, 256), "f4"), ((4,), "i4")))
    loss = lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes, expected_rows=100).sum()
    with compiling_for("v5p"):
        traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(lhs, rhs, sizes)
    assert count_flops(traced) == 3 * 2 * 100 * 128 * 256
