"""Attention: which backend runs, what it says, and what it refuses."""

import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.kernels import backends
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention, capabilities
from t5x_like.kernels.target import compiling_for

# As an attribute of its room it is the function.
file = importlib.import_module("t5x_like.kernels.attention.attention")

Q = K = V = jnp.ones((2, 3, 4, 8))


@pytest.fixture
def messages(monkeypatch):
    said = []
    monkeypatch.setattr(backends.logging, "info", said.append)
    backends.log_once.cache_clear()
    return said


@pytest.fixture
def picky(monkeypatch):
    """A backend, preferred to the reference, that has no soft-cap and answers 7."""
    backend = backends.Backend(
        run=lambda call: (jnp.full(call.q.shape, 7.0), None),
        refusal=lambda call: None if call.soft_cap is None else "it has no soft-cap",
    )
    monkeypatch.setattr(file, "BACKENDS", {"picky": backend, **file.BACKENDS})


def test_auto_takes_the_first_that_can(picky, messages):
    assert attention(Q, K, V)[0, 0, 0, 0] == 7
    assert attention(Q, K, V, soft_cap=2.0)[0, 0, 0, 0] == 1
    assert "picky" in messages[0]
    assert "reference" in messages[1]
    assert "picky because it has no soft-cap" in messages[1]


def test_a_choice_is_logged_once(messages):
    for _ in range(3):
        attention(Q, K, V, backend="reference")
    assert messages == ["attention: reference, as asked for."]


def test_a_named_backend_refuses_instead_of_falling_back(picky):
    with pytest.raises(UserError, match=r"'picky' cannot, because it has no soft-cap\. Use reference"):
        attention(Q, K, V, soft_cap=2.0, backend="picky")


def test_auto_does_not_keep_too_many_scores(messages, monkeypatch):
    monkeypatch.setattr(capabilities, "AUTO_MAX_SCORES", 2 * 4 * 3 * 3 - 1)
    attention(Q, K, V)
    assert "attention: chunked" in messages[0]
    assert "reference because it would keep 72 scores, more than 71" in messages[0]
    attention(Q, K, V, bias=jnp.zeros((1, 1, 3, 3)))
    assert "attention: reference" in messages[1]
    attention(Q, K, V, backend="reference")
    assert messages[2] == "attention: reference, as asked for."


@pytest.mark.parametrize(("length", "backend"), [(512, "reference"), (513, "chunked")])
def test_auto_takes_chunks_for_long_rows_on_cpu(messages, length, backend):
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    jax.eval_shape(attention, q, q, q)
    assert f"attention: {backend}" in messages[0]


@pytest.fixture
def never_run(monkeypatch):
    """Libraries of backends may be missing here."""
    unrun = {name: dataclasses.replace(entry, run=lambda call: (call.q, None)) for name, entry in file.BACKENDS.items()}
    monkeypatch.setattr(file, "BACKENDS", unrun)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"mask": MaskSpec(causal=True)}, "triton"),
        ({"relative_bias": (RelativeBias(), jnp.zeros((2, 32)))}, "triton"),
        ({"bias": jnp.zeros((1, 2, 2048, 2048), jnp.bfloat16)}, "cudnn"),
        ({"dropout_rate": 0.1, "dropout_key": jnp.zeros(2, jnp.uint32)}, "reference"),
        ({"dropout_rate": 0.1, "dropout_key": jnp.zeros(2, jnp.uint32), "batch": 64}, "chunked"),
    ],
)
@pytest.mark.parametrize("chip", ["a100", "h200", "gpu"])
def test_auto_on_gpu(messages, never_run, chip, options, backend):
    shape = jax.ShapeDtypeStruct((options.get("batch", 1), 2048, 2, 64), jnp.bfloat16)
    options = {name: value for name, value in options.items() if name != "batch"}
    with compiling_for(chip):
        jax.eval_shape(lambda q: attention(q, q, q, **options), shape)
    assert f"attention: {backend}, the first" in messages[0]


def test_auto_says_so_if_nothing_suits(monkeypatch):
    reserved = backends.Backend(file.BACKENDS["reference"].run, lambda call: None, lambda call: "it is slow")
    monkeypatch.setattr(file, "BACKENDS", {"reference": reserved})
    with pytest.raises(UserError, match=r"no backend suits: reference because it is slow\. Name one that can: ref"):
        attention(Q, K, V)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="no backend 'flash': choose from auto, tpu, mosaic_gpu, triton, cudnn, "):
        attention(Q, K, V, backend="flash")


IDS = jnp.ones((2, 3), jnp.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": jnp.ones((2, 3, 3, 8)), "v": jnp.ones((2, 3, 3, 8))}, "4 query heads cannot share 3 key heads"),
        ({"v": jnp.ones((2, 5, 4, 8))}, "v (2, 5, 4, 8) do not fit"),
        ({"k": jnp.ones((1, 3, 4, 8)), "v": jnp.ones((1, 3, 4, 8))}, "do not fit"),
        ({"q": jnp.ones((2, 3, 32))}, "do not fit"),
        ({"segment_ids": (IDS, IDS[:, :2])}, "segment_ids of the keys have shape (2, 2)"),
        ({"segment_ids": (IDS[:1], IDS)}, "segment_ids of the queries have shape (1, 3)"),
        ({"positions": (IDS[0], IDS)}, "positions of the queries have shape (3,)"),
        ({"relative_bias": (RelativeBias(), jnp.ones((4, 31)))}, "relative_bias has shape (4, 31): give (4, 32)"),
        ({"alibi_slopes": jnp.ones(3)}, "alibi_slopes has shape (3,): give (4,)"),
        ({"sinks": jnp.ones((1, 4))}, "sinks has shape (1, 4): give (4,)"),
        ({"bias": jnp.ones((2, 4, 3, 5))}, "bias has shape (2, 4, 3, 5): give [batch, heads, q_length, kv_length]"),
        ({"bias": jnp.ones((3, 3))}, "bias has shape (3, 3)"),
        ({"dropout_rate": 0.5}, "needs a dropout_key"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        attention(**{"q": Q, "k": K, "v": V, **arguments})


def test_default_positions_count_from_zero():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 3, 4, 8)).astype(np.float32)
    given = attention(q, k, v, mask=MaskSpec(causal=True), positions=(np.arange(3)[None], np.arange(3)[None]))
    np.testing.assert_array_equal(given, attention(q, k, v, mask=MaskSpec(causal=True)))


def test_a_number_stands_for_consecutive_positions():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 3, 4, 8)).astype(np.float32)
    arrays = ((np.arange(3) + 4)[None], (np.arange(3) + 3)[None])
    mask = MaskSpec(causal=True, chunk=2)
    expected = attention(q, k, v, mask=mask, positions=arrays)
    np.testing.assert_array_equal(attention(q, k, v, mask=mask, positions=(4, jnp.int32(3))), expected)
