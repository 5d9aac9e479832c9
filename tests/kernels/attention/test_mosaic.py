"""The forward kernel of Mosaic GPU: by its interpreter, with races detected, against the reference; and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention, gpu_block_sizes
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks
from t5x_like.kernels.attention.target import compiling_for
from tests.kernels.attention import lowering

CAUSAL = MaskSpec(causal=True)


@pytest.fixture
def narrow_heads(monkeypatch):
    """The interpreter takes any head_dim, the slower the larger."""
    monkeypatch.setitem(gpu_block_sizes.MOSAIC, 64, GpuBlocks(32, 16, 12, 2))


def arrays(q_length, kv_length):
    rng = np.random.default_rng(0)
    shapes = ((1, q_length, 2, 64), (1, kv_length, 1, 64), (1, kv_length, 1, 64))
    return {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in zip("qkv", shapes, strict=True)}


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((32, 40), {"mask": MaskSpec(causal=True, window=(12, None)), "positions": (7, 0), "return_lse": True}),
        ((20, 60), {"soft_cap": 2.0}),
    ],
    ids=["causal window", "soft-cap"],
)
def test_equals_reference(lengths, options, narrow_heads, capfd):
    """In bfloat16, so within the rounding of the weights and of the output."""
    narrow = arrays(*lengths)
    with compiling_for("h100", interpreted=True):
        ours = attention(**narrow, **options, backend="mosaic_gpu")
    expected = attention(**{name: array.astype(jnp.float32) for name, array in narrow.items()}, **options)
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=2e-2)
    jax.tree.map(close, ours, expected)
    assert "RACE DETECTED" not in capfd.readouterr().out  # newer interpreters raise


CASES = {
    "causal": {"mask": CAUSAL},
    "offsets": {"mask": MaskSpec(causal=True, window=(300, None)), "offsets": True, "sinks": True},
    "chunks, 128": {"mask": MaskSpec(causal=True, chunk=256), "dims": (128, 128)},
    "ragged, 256, soft-cap": {"lengths": (1000, 700), "dims": (256, 256), "soft_cap": 30.0},
    "prefix, float16": {"mask": MaskSpec(causal=True, prefix=30), "dtype": jnp.float16},
}


@pytest.mark.parametrize("features", CASES.values(), ids=CASES)
def test_lowers_for_cuda(features):
    program = lowering.for_cuda(*lowering.gradient("mosaic_gpu", **features), "h100")
    assert program.count("@mosaic_gpu_v2") == 1  # the forward pass
    assert program.count("__gpu$xla.gpu.triton") == 2  # the backward pass


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"segment_ids": (jnp.ones((1, 8), jnp.int32),) * 2}, "it has no segments"),
        ({"positions": (jnp.ones((1, 8), jnp.int32),) * 2}, "it has no position arrays"),
        ({"relative_bias": (RelativeBias(), jnp.zeros((2, 32)))}, "it has no biases"),
        ({"alibi_slopes": jnp.ones(2)}, "it has no biases"),
        ({"dropout_rate": 0.1, "dropout_key": jnp.zeros(2, jnp.uint32)}, "it has no dropout"),
        ({name: jnp.zeros((1, 8, 1, 64)) for name in "qkv"}, "it needs bfloat16 or float16"),
        ({name: jnp.zeros((1, 8, 1, 80), jnp.bfloat16) for name in "qkv"}, "head_dim 80 .* is not one multiple of 64"),
    ],
)
def test_what_it_cannot_do_is_refused(options, reason):
    with compiling_for("h100"), pytest.raises(UserError, match=f"'mosaic_gpu' cannot, because .*{reason}"):
        attention(**{**arrays(8, 8), **options}, backend="mosaic_gpu")


def test_off_hopper_it_is_refused():
    with compiling_for("a100"), pytest.raises(UserError, match="it runs on Hopper GPUs, and this program is for a100"):
        attention(**arrays(8, 8), backend="mosaic_gpu")
