"""The cuDNN backend: what is asked of `jax.nn`, by its XLA implementation, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.target import compiling_for

CAUSAL = MaskSpec(causal=True)


def arrays(heads=4, kv_heads=2, kv_length=8, dim=16):
    rng = np.random.default_rng(0)
    shapes = ((2, 8, heads, dim), (2, kv_length, kv_heads, dim), (2, kv_length, kv_heads, dim))
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": CAUSAL, "scale": 0.5},
        {"mask": MaskSpec(causal=True, window=(2, None))},
        {"mask": MaskSpec(causal=True, window=(2, 5)), "positions": (3, 3)},
        {"bias": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(jnp.bfloat16)},
    ],
    ids=str,
)
def test_asks_for_what_the_reference_does(options, monkeypatch):
    """cuDNN itself is not here: `jax.nn` does by XLA what it was asked to do by cuDNN."""
    asked = []

    def by_xla(*args, implementation, original=jax.nn.dot_product_attention, **kwargs):
        asked.append(implementation)
        return original(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    with compiling_for("h100"):
        ours = attention(*arrays(), **options, backend="cudnn")
    expected = attention(*(array.astype(jnp.float32) for array in arrays()), **options)
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=2e-2)
    assert asked == ["cudnn"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_rate": 0.1, "dropout_key": jnp.zeros(2, jnp.uint32)}, "no dropout"),
        ({"soft_cap": 1.0}, "no soft-cap"),
        ({"sinks": jnp.zeros(4)}, "no sinks"),
        ({"return_lse": True}, "log-sum-exp in the dtype of the output"),
        ({"segment_ids": (jnp.ones((2, 8), jnp.int32),) * 2}, "segments would take a mask"),
        ({"alibi_slopes": jnp.ones(4)}, "biases of positions"),
        ({"relative_bias": (RelativeBias(), jnp.zeros((4, 32)))}, "biases of positions"),
        ({"mask": MaskSpec(chunk=4)}, "neither chunks nor a prefix"),
        ({"mask": MaskSpec(causal=True, prefix=4)}, "neither chunks nor a prefix"),
        ({"mask": MaskSpec(window=(2, 0))}, "window is for causal masks"),
        ({"mask": CAUSAL, "positions": (1, 0)}, "at the same positions"),
        ({"mask": CAUSAL, "positions": (jnp.zeros((2, 8), jnp.int32),) * 2}, "at the same positions"),
        ({"bias": jnp.zeros((1, 4, 8, 8))}, "its bias needs the dtype of q"),
        ({"bias": jnp.zeros((1, 4, 1, 8), jnp.bfloat16)}, "its bias needs"),
    ],
)
def test_what_it_cannot_do_is_refused(options, reason):
    with compiling_for("h100"), pytest.raises(UserError, match=f"'cudnn' cannot, because .*{reason}"):
        attention(*arrays(), **options, backend="cudnn")


def test_shapes_and_dtypes_are_refused():
    run = functools.partial(attention, backend="cudnn")
    with compiling_for("h100"), pytest.raises(UserError, match="at the same positions"):
        run(*arrays(kv_length=6), mask=CAUSAL)
    with compiling_for("h100"), pytest.raises(UserError, match="head_dim 12 "):
        run(*arrays(dim=12))
    with compiling_for("a100"), pytest.raises(UserError, match=r"head_dim 136 .* up to 128"):
        run(*arrays(dim=136))
    with compiling_for("h100"), pytest.raises(UserError, match="needs one dtype"):
        run(*(array.astype(jnp.float32) for array in arrays()))
    with pytest.raises(UserError, match="it runs on GPU, and this program is for cpu"):
        run(*arrays())
