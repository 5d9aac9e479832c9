"""On a GPU: every backend that runs there against the reference, and against cuDNN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.target import HOPPER, target_chip
from tests.kernels.attention import agreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason=f"there is no GPU here, only {jax.default_backend()}"),
]

SEGMENTS = np.repeat([[1, 2, 3, 0]], 250, axis=1).astype(np.int32)
CASES = {
    "causal, 128": {"dims": (128, 128), "mask": MaskSpec(causal=True)},
    "window, 64": {"dims": (64, 64), "mask": MaskSpec(causal=True, window=(200, None))},
    "packed, 256": {"dims": (256, 256), "segment_ids": (np.repeat(SEGMENTS, 2, axis=0),) * 2},
    "192/128, soft-cap, sinks": {"dims": (192, 128), "soft_cap": 20.0, "sinks": True},
    "relative bias, 64": {"dims": (64, 64), "relative_bias": RelativeBias()},
    "alibi, 80": {"dims": (80, 80), "alibi_slopes": np.asarray([0.5, 0.25, 0.1, 0.01], np.float32)},
}


def make_call(dims, sinks=False, **options) -> agreement.Call:
    normal = lambda *shape: np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)
    trained = {"q": normal(2, 1000, 4, dims[0]), "k": normal(2, 1000, 2, dims[0]), "v": normal(2, 1000, 2, dims[1])}
    if sinks:
        trained["sinks"] = normal(4)
    if "relative_bias" in options:
        trained["table"] = normal(4, 32)
    return agreement.Call(trained, options)


@pytest.mark.parametrize("features", CASES.values(), ids=CASES)
def test_triton_is_as_exact_as_the_reference(features):
    check("triton", make_call(**features))


@pytest.mark.skipif(target_chip() not in HOPPER, reason="for Hopper GPUs")
@pytest.mark.parametrize("name", ["causal, 128", "window, 64"])
def test_mosaic_gpu_is_as_exact_as_the_reference(name):
    check("mosaic_gpu", make_call(**CASES[name]))


def check(backend: str, call: agreement.Call):
    """Errors in bfloat16 are no more than 1.5 times the reference's, by the norm of each array; 2 for sums of rows."""
    with jax.default_matmul_precision("highest"):
        exact = agreement.run(call, "reference")
    theirs, ours = agreement.run(call, "reference", jnp.bfloat16), agreement.run(call, backend, jnp.bfloat16)
    for name, array in exact.items():
        ratio = np.linalg.norm(ours[name] - array) / np.linalg.norm(theirs[name] - array)
        assert ratio <= (2 if name in ("table", "sinks") else 1.5), (name, ratio)


def test_equals_cudnn():
    q, k, v = (jnp.asarray(array, jnp.bfloat16) for array in make_call(dims=(128, 128)).trained.values())
    run = functools.partial(attention, q, k, v, mask=MaskSpec(causal=True))
    theirs = run(backend="cudnn").astype(jnp.float32)
    np.testing.assert_allclose(run(backend="triton").astype(jnp.float32), theirs, atol=2e-2)


def test_two_runs_agree_to_the_last_bit():
    call = make_call(**CASES["relative bias, 64"])
    first, second = (agreement.run(call, "triton", jnp.bfloat16) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
