"""The chunked backend: agreement with the reference, leaks, dropout, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, attention, chunked
from tests.kernels.attention import agreement


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", 4)
        yield


GRID = {"lengths": [(11, 11), (8, 8), (3, 14), (13, 5), (1, 9)], "dims": [(4, 4), (4, 6)]}


@pytest.mark.parametrize("call", agreement.covering(**GRID))
def test_equals_reference_with_all_gradients(call):
    agreement.check_agreement(call, "chunked")


@pytest.mark.slow
@settings(max_examples=50)
@given(agreement.calls(**GRID))
def test_equals_reference_in_many_calls(call):
    agreement.check_agreement(call, "chunked")


def test_bfloat16_is_as_exact_as_the_reference():
    agreement.check_bfloat16("chunked", lengths=(32, 32))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": MaskSpec(causal=True)},
        {"mask": MaskSpec(chunk=6)},
        {"segment_ids": (np.repeat([[1, 2]], 6, axis=1),) * 2},
    ],
    ids=str,
)
def test_nothing_leaks(options):
    agreement.check_leaks("chunked", options, length=12, head_dim=4)


def test_dropout_drops_the_same_in_both_passes():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 10, 2, 4)).astype(np.float32)
    function = lambda v: attention(q, k, v, dropout_rate=0.5, dropout_key=jax.random.key(0), backend="chunked")
    kept = attention(q, k, v, backend="chunked")
    # Linear in v, so the gradient must give the very values back; and what is kept is doubled.
    out, pull = jax.vjp(function, v)
    np.testing.assert_allclose(jnp.vdot(pull(kept)[0], v), jnp.vdot(out, kept), rtol=1e-5)
    identity = np.broadcast_to(np.eye(10, dtype=np.float32)[None, :, None], (1, 10, 2, 10))
    dropped = attention(q, k, identity, dropout_rate=0.5, dropout_key=jax.random.key(0), backend="chunked")
    whole = attention(q, k, identity)
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, 2 * whole), rtol=1e-5)
    assert 0.3 < np.mean(np.asarray(dropped) == 0) < 0.7


def test_dropout_gradient_of_queries_is_that_of_the_output():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 6, 1, 4)).astype(np.float32)
    direction = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    @jax.jit
    def loss(q):
        out = attention(q, k, v, dropout_rate=0.3, dropout_key=jax.random.key(1), backend="chunked")
        return jnp.sum(jnp.sin(out))

    slope = (loss(q + 1e-2 * direction) - loss(q - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(q), direction), slope, rtol=1e-2)


def test_a_general_bias_is_refused():
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(UserError, match="'chunked' cannot, because it has no general bias"):
        attention(q, q, q, bias=jnp.zeros((1, 2, 3, 3)), backend="chunked")


def test_memory_grows_with_the_length(monkeypatch):
    """Compiled only: four times the length takes about four times the memory, not sixteen."""
    monkeypatch.setattr(chunked, "CHUNK", 512)

    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        loss = lambda *qkv: attention(*qkv, mask=MaskSpec(causal=True), backend="chunked").sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 4.5 * short
    assert long < 16384 * 16384  # a byte for each score would be more
