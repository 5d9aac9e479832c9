"""The Triton kernels: by Pallas' interpreter against the reference, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention, gpu_block_sizes
from t5x_like.kernels.attention.blocks import Tokens, consecutive, padded_tokens
from t5x_like.kernels.attention.gpu_block_sizes import GpuBlocks, GpuTuning
from t5x_like.kernels.attention.masks import allowed
from t5x_like.kernels.attention.prepared import Plan
from t5x_like.kernels.attention.triton_tiles import Visits, make_visits, parts
from t5x_like.kernels.target import compiling_for
from tests.kernels.attention import agreement, lowering
from tests.kernels.platforms import interpreted

SMALL = GpuTuning(forward=GpuBlocks(32, 16, 4, 2), dq=GpuBlocks(16, 32, 4, 2), dkv=GpuBlocks(32, 16, 4, 2))


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_block_sizes, "FLOAT32", SMALL)
        yield


GRID = {
    "lengths": [(70, 100), (64, 64), (50, 20)],
    "dims": [(64, 64), (128, 128), (256, 256), (192, 128), (48, 32), (16, 16)],
    "stretch": 4,
}


@pytest.mark.parametrize("call", agreement.covering(**GRID))
def test_equals_reference_with_all_gradients(call):
    with interpreted("gpu"):
        agreement.check_agreement(call, "triton")


@pytest.mark.slow
@settings(max_examples=50)
@given(agreement.calls(**GRID))
def test_equals_reference_in_many_calls(call):
    with interpreted("gpu"):
        agreement.check_agreement(call, "triton")


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def everything():
    """A call with packing, grouped heads, a relative bias and a window; the last quarter is padding."""
    trained = {name: normal(1, 128, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    segments = np.repeat([[1, 2, 3, 0]], 32, axis=1).astype(np.int32)
    options = {
        "mask": MaskSpec(causal=True, window=(50, None)),
        "segment_ids": (segments, segments),
        "relative_bias": RelativeBias(8, 20),
    }
    return agreement.Call({**trained, "table": normal(4, 8)}, options)


def test_padding_is_not_computed_gives_zeros_and_passes_no_gradient():
    """Its blocks hold NaN in one of the runs, which would reach every sum."""
    call = everything()
    poisoned = {name: call.trained[name].copy() for name in ("k", "v")}
    for array in poisoned.values():
        array[:, 96:] = np.nan
    with interpreted("gpu"):
        clean = agreement.run(call, "triton")
        dirty = agreement.run(call._replace(trained={**call.trained, **poisoned}), "triton")
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not any(clean[name][:, 96:].any() for name in ("o", "q", "k", "v"))
    assert all(np.isfinite(array).all() for array in clean.values())


def test_bfloat16_is_as_exact_as_the_reference():
    with interpreted("gpu"):
        agreement.check_bfloat16("triton", lengths=(64, 64))


@pytest.mark.parametrize(
    "options",
    [{"mask": MaskSpec(causal=True)}, {"segment_ids": (np.repeat([[1, 2]], 50, axis=1).astype(np.int32),) * 2}],
    ids=["causal", "segments"],
)
def test_nothing_leaks(options):
    with interpreted("gpu"):
        agreement.check_leaks("triton", options, length=100, head_dim=16)


@settings(max_examples=8)
@given(agreement.calls(lengths=[(70, 100), (64, 64)], dims=[(4, 4)], stretch=3))
def test_every_tile_with_work_is_visited_once(call):
    """And those that are plain need no mask, and have one bias."""
    blocks, spec = SMALL.dq, call.options.get("relative_bias")
    lengths = [call.trained[name].shape[1] for name in ("q", "k")]
    positions = tuple(consecutive(5, length) for length in lengths)
    tokens = padded_tokens(Tokens(positions, call.options.get("segment_ids")), blocks.q, blocks.kv)
    plan = Plan(call.options["mask"], 1.0, None, spec, None, False, SMALL, True)
    tables = make_visits(plan, tokens, blocks)
    pairs = np.asarray(allowed(plan.mask, tuple(map(jnp.asarray, tokens.positions)), tokens.segment_ids))
    relative = tokens.positions[1][:, None, :] - tokens.positions[0][:, :, None]
    far = np.abs(relative) >= (0 if spec is None else spec.max_distance)
    shape = (-1, relative.shape[1] // blocks.q, blocks.q, relative.shape[2] // blocks.kv, blocks.kv)
    every = np.ones_like(far)
    some, plain = (pairs & every).reshape(shape).any((2, 4)), (pairs & far).reshape(shape).all((2, 4))
    by_side = ((tables[0], some, plain), (tables[1], some.swapaxes(1, 2), plain.swapaxes(1, 2)))
    for table, with_work, may_be_plain in by_side:
        for b, i in np.ndindex(table.shape[:2]):
            visits = Visits(*np.asarray(table[b, i]))
            plain_visits = [int(visits.plain(n)) for n in range(visits.num_plain)]
            others = [int(visits.other(n)) for n in range(visits.num_others)]
            assert len(set(plain_visits + others)) == len(plain_visits + others)
            assert set(np.flatnonzero(with_work[b % len(with_work), i])) <= set(plain_visits + others)
            assert may_be_plain[b % len(may_be_plain), i, plain_visits].all()


def test_most_tiles_of_a_long_row_with_a_relative_bias_are_plain():
    tokens = Tokens((consecutive(0, 8192),) * 2, None)
    plan = Plan(MaskSpec(), 1.0, None, RelativeBias(), None, False, SMALL, True)
    visits = Visits(*make_visits(plan, tokens, GpuBlocks(128, 128, 8, 3))[0][0].T)
    assert int(visits.num_others.max()) == 3
    assert int((visits.num_plain + visits.num_others).min()) == 64


def test_parts_are_powers_of_two():
    assert parts(192) == [slice(0, 128), slice(128, 192)]
    assert parts(80) == [slice(0, 64), slice(64, 80)]
    assert parts(256) == [slice(0, 256)]


@pytest.mark.parametrize("chip", ["a100", "h100", "gpu"])
@pytest.mark.parametrize("features", lowering.CASES.values(), ids=lowering.CASES)
def test_lowers_for_cuda(features, chip):
    program = lowering.for_cuda(*lowering.gradient("triton", **features), chip)
    assert program.count("__gpu$xla.gpu.triton") == 3


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
        ({"relative_bias": (RelativeBias(32, 2048), jnp.zeros((2, 32)))}, "reaches 1024 positions at most"),
        ({"q": jnp.zeros((1, 256, 2, 64))}, "needs one dtype, .*, and was given bfloat16, float32"),
    ],
)
def test_what_it_cannot_do_is_refused(options, reason):
    arrays = {name: jnp.zeros(SHAPE.shape, SHAPE.dtype) for name in "qkv"}
    with interpreted("gpu"), pytest.raises(UserError, match=f"'triton' cannot, because .*{reason}"):
        attention(**{**arrays, **options}, backend="triton")


def test_off_gpu_it_is_refused():
    q = jnp.zeros((1, 8, 1, 64))
    with compiling_for("v5p"), pytest.raises(UserError, match="it runs on GPU, and this program is for v5p"):
        attention(q, q, q, backend="triton")
