"""The schedule against plain differentiation of a toy, and what it computes when."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.pipeline.gpipe import by_microbatch, pipelined
from t5x_like.sharding.pipeline.one_f_one_b import Pieces, one_forward_one_backward

ROWS, WIDTH, LAYERS = 12, 3, 8


def run_layers(layers, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x**2)), x, layers)


def pieces(count=lambda name: None):
    """Every piece adds to the objective; `count` hears of each run of a piece."""

    def first(rest, rows):
        count("first")
        rest, _ = rest
        x = rows["x"] * rest["scale"]
        return (x, jnp.sum(x**3)), {"first": jnp.sum(x)}

    def middle(layers, rest, x, rows):
        count("layers")
        rest, own = rest
        x, squares = run_layers(layers, x + rest["shift"] + (0 if own is None else own))
        return (x, jnp.sum(squares * rest["scale"])), {"squares": squares}

    def last(rest, x, rows):
        count("last")
        rest, _ = rest
        return jnp.sum((x * rest["scale"] - rows["y"]) ** 2), {"last": jnp.sum(x)}

    return Pieces(first, middle, last)


def given():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rest = {"scale": np.float32(0.7), "shift": normal(WIDTH)}
    return 0.5 * normal(LAYERS, WIDTH, WIDTH), rest, {"x": normal(ROWS, 2, WIDTH), "y": normal(ROWS, 2, WIDTH)}


@pytest.mark.parametrize(("stages", "count"), [(2, 3), (4, 6), (4, 2)])
def test_value_and_gradient_are_those_of_the_whole(stages, count):
    def whole(layers, rest, rows, own):
        cut, rest = pieces(), (rest, own)
        (x, begins), found = cut.first(rest, rows)
        # The shift is added where each stage begins.
        objective = begins
        squares = []
        for some in jnp.split(layers, stages):
            (x, more), results = cut.layers(some, rest, x, rows)
            objective += more
            squares.append(results["squares"])
        ends, last = cut.last(rest, x, rows)
        return objective + ends, (found, {"squares": jnp.concatenate(squares)}, last)

    layers, rest, rows = given()
    own = 0.1 * np.random.default_rng(1).normal(size=rows["x"].shape).astype(np.float32)
    value_and_grad = jax.jit(jax.value_and_grad(whole, (0, 1, 3), has_aux=True))
    (value, results), gradients = value_and_grad(layers, rest, rows, own)
    with jax.set_mesh(build_mesh(MeshConfig(data=1, stage=stages), jax.devices()[:stages])):
        ours = jax.jit(lambda *args: one_forward_one_backward(pieces(), *args, num_microbatches=count))
        (objective, *found), found_gradients = ours(layers, rest, rows, own)
    np.testing.assert_allclose(objective, value, rtol=1e-5)
    for one, other in zip(
        jax.tree.leaves((found, found_gradients)), jax.tree.leaves((results, gradients)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def calls(run):
    """How often each piece really ran, on all stages together."""
    heard = collections.Counter()
    count = lambda name: jax.debug.callback(lambda: heard.update([name]))
    # A mesh of stages alone: on others a callback is not called by every device.
    with jax.set_mesh(jax.make_mesh((4,), ("stage",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])):
        jax.block_until_ready(jax.jit(lambda: run(count))())
        jax.effects_barrier()
    return heard


def test_nothing_is_computed_in_bubbles():
    layers, rest, rows = given()
    run = lambda count: one_forward_one_backward(pieces(count), layers, rest, rows, num_microbatches=6)
    heard = calls(run)
    # Forward on all stages but the last, and again with the backward pass on all; the first piece goes with both, and
    # once more for its own gradient.
    assert heard == {"layers": 6 * 3 + 6 * 4, "first": 3 * 6, "last": 6}


@pytest.mark.parametrize("repeats", [1, 2])
def test_nothing_is_computed_in_bubbles_of_gpipe(repeats):
    layers, _, rows = given()

    def run(count):
        def some(layers, x, rows, shared):
            count("layers")
            return run_layers(layers, x)

        return pipelined(some, layers, rows["x"], None, None, num_microbatches=6, repeats=repeats)

    assert calls(run) == {"layers": 6 * 4 * repeats}


def test_microbatches_take_every_row_once():
    rows = by_microbatch(jnp.arange(12), 3)
    assert rows.shape == (3, 4)
    assert sorted(rows.ravel().tolist()) == list(range(12))
