"""The Mosaic GPU kernels: by their interpreter, with races detected, against the reference; and lowered."""

import jax.numpy as jnp
import pytest

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention, gpu_block_sizes
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks, GpuTuning
from t5x_like.kernels.target import compiling_for
from tests.kernels.attention import agreement, lowering
from tests.kernels.platforms import interpreted

CAUSAL = MaskSpec(causal=True)


@pytest.fixture
def narrow_heads(monkeypatch):
    """The interpreter takes blocks of any size, the slower the larger."""
    small = GpuTuning(GpuBlocks(32, 16, 12, 2), GpuBlocks(32, 16, 12, 2), GpuBlocks(16, 32, 12, 2))
    monkeypatch.setitem(gpu_block_sizes.MOSAIC, 64, small)


def arrays(q_length, kv_length):
    return {
        name: jnp.zeros((1, n, 2, 64), jnp.bfloat16)
        for name, n in zip("qkv", (q_length, *[kv_length] * 2), strict=True)
    }


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((32, 40), {"mask": MaskSpec(causal=True, window=(12, None)), "positions": (7, 0)}),
        ((20, 60), {"soft_cap": 2.0}),
    ],
    ids=["causal window", "soft-cap"],
)
def test_as_exact_as_the_reference_with_all_gradients(lengths, options, narrow_heads, capfd):
    with interpreted("gpu"):
        agreement.check_bfloat16("mosaic_gpu", lengths, (2, 1), options, draws=1)
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
    by_triton = 2 if features.get("dims") == (256, 256) else 0  # the backward pass
    assert program.count("@mosaic_gpu_v2") == 3 - by_triton
    assert program.count("__gpu$xla.gpu.triton") == by_triton


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
