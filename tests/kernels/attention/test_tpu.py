"""The TPU kernels: by Pallas' interpreter, where memory starts as NaN, against the reference; and lowered for TPU."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention, block_sizes
from t5x_like.kernels.attention.block_sizes import BlockSizes, Tuning
from t5x_like.kernels.target import compiling_for
from tests.kernels.attention import agreement, lowering
from tests.kernels.platforms import interpreted

SMALL = Tuning(
    forward=BlockSizes(128, 256, 128),
    forward_long=BlockSizes(128, 256, 128),
    backward=BlockSizes(256, 256, 128),
    vmem_mib=128,
)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(block_sizes.TUNINGS, "v5e", SMALL)
        yield


GRID = {
    "lengths": [(300, 520), (128, 128), (130, 70)],
    "dims": [(64, 64), (128, 128), (256, 256), (192, 128), (80, 80), (48, 32)],
    "stretch": 20,
}


@pytest.mark.parametrize("call", agreement.covering(**GRID))
def test_equals_reference_with_all_gradients(call):
    with interpreted("tpu"):
        agreement.check_agreement(call, "tpu")


@pytest.mark.slow
@settings(max_examples=50)
@given(agreement.calls(**GRID))
def test_equals_reference_in_many_calls(call):
    with interpreted("tpu"):
        agreement.check_agreement(call, "tpu")


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def everything():
    """A call with packing, grouped heads, a relative bias and a window."""
    length = 512
    trained = {name: normal(1, length, heads, 64) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    segments = np.repeat([[1, 2, 3, 0]], length // 4, axis=1).astype(np.int32)
    options = {
        "mask": MaskSpec(causal=True, window=(100, None)),
        "segment_ids": (segments, segments),
        "relative_bias": RelativeBias(8, 40),
    }
    return agreement.Call({**trained, "table": normal(4, 8)}, options)


def test_keys_in_parts(monkeypatch):
    """With little vector memory, the gradients of the keys come in parts."""
    monkeypatch.setitem(block_sizes.TUNINGS, "v5e", dataclasses.replace(SMALL, vmem_mib=1))
    assert block_sizes.TUNINGS["v5e"].resident_keys(8 * 128) < 512
    with interpreted("tpu"):
        agreement.check_agreement(everything(), "tpu")


def test_two_cores_do_not_race():
    with interpreted("tpu", detect_races=True, num_cores_or_threads=2):
        agreement.check_agreement(everything(), "tpu")
    assert not interpret_pallas_call.races.races_found


def test_bfloat16_is_as_exact_as_the_reference():
    with interpreted("tpu"):
        agreement.check_bfloat16("tpu", lengths=(256, 256))


@pytest.mark.parametrize(
    "options",
    [{"mask": MaskSpec(causal=True)}, {"segment_ids": (np.repeat([[1, 2]], 100, axis=1).astype(np.int32),) * 2}],
    ids=["causal", "segments"],
)
def test_nothing_leaks(options):
    with interpreted("tpu"):
        agreement.check_leaks("tpu", options, length=200, head_dim=64)


def test_padding_is_not_computed_gives_zeros_and_passes_no_gradient():
    """Its blocks hold NaN in one of the runs, which would reach every sum."""
    call = everything()
    segments = np.repeat([[1, 2, 0, 0]], 128, axis=1).astype(np.int32)
    call = call._replace(options={**call.options, "segment_ids": (segments, segments)})
    poisoned = {name: call.trained[name].copy() for name in ("k", "v")}
    for array in poisoned.values():
        array[:, 256:] = np.nan
    with interpreted("tpu"):
        clean = agreement.run(call, "tpu")
        dirty = agreement.run(call._replace(trained={**call.trained, **poisoned}), "tpu")
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not any(clean[name][:, 256:].any() for name in ("o", "q", "k", "v"))
    assert all(np.isfinite(array).all() for array in clean.values())


@pytest.mark.parametrize("chip", ["v4", "v6e"])
@pytest.mark.parametrize("features", lowering.CASES.values(), ids=lowering.CASES)
def test_lowers_for_tpu(features, chip):
    function, arguments = lowering.gradient("tpu", **features)
    with compiling_for(chip):
        exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments)
    assert exported.mlir_module().count("tpu_custom_call") >= 2


SHAPE = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_rate": 0.1, "dropout_key": jnp.zeros(2, jnp.uint32)}, "no dropout"),
        ({"bias": jnp.zeros((1, 1, 1, 256))}, "no general bias"),
        (
            {"relative_bias": (RelativeBias(), jnp.zeros((2, 32))), "positions": (jnp.zeros((1, 256), jnp.int32),) * 2},
            "needs consecutive positions",
        ),
        ({"q": jnp.zeros((1, 256, 2, 64))}, "needs one dtype, bfloat16 or float32, and was given bfloat16, float32"),
    ],
)
def test_what_it_cannot_do_is_refused(options, reason):
    arrays = {name: jnp.zeros(SHAPE.shape, SHAPE.dtype) for name in "qkv"}
    with compiling_for("v5e"), pytest.raises(UserError, match=f"'tpu' cannot, because .*{reason}"):
        attention(**{**arrays, **options}, backend="tpu")


@pytest.mark.parametrize("head_dim", [60, 272])
def test_odd_and_large_heads_are_refused(head_dim):
    q = jnp.zeros((1, 8, 1, head_dim))
    with compiling_for("v5e"), pytest.raises(UserError, match=f"head_dim {head_dim} "):
        attention(q, q, q, backend="tpu")


def test_off_tpu_it_is_refused():
    q = jnp.zeros((1, 8, 1, 64))
    with pytest.raises(UserError, match="it runs on TPU, and this program is for cpu"):
        attention(q, q, q, backend="tpu")


def test_the_door_does_not_import_pallas():
    """Importing it takes longer than a small model's first step."""
    script = "import sys, t5x_like.kernels.attention; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
