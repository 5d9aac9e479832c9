"""Plain attention: against a naive version in numpy, jax.nn, finite differences, and for leaks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.attention.logits import MASK_VALUE

HEAD_DIM = 4


def naive(q, k, v, bias=0.0, sinks=None, *, mask=MaskSpec(), segment_ids=None, positions=None, soft_cap=None):
    """One query at a time, in float64, over the list of keys it may attend to; and the log-sum-exp."""
    batch, q_length, heads, head_dim = q.shape
    kv_length, kv_heads = k.shape[1:3]
    bias = np.broadcast_to(bias, (batch, heads, q_length, kv_length))
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], MASK_VALUE)
    for b, n, t in itertools.product(range(batch), range(heads), range(q_length)):
        keys = [s for s in range(kv_length) if may_attend(b, t, s, mask, segment_ids, positions)]
        shared = n // (heads // kv_heads)
        logits = k[b, keys, shared] @ q[b, t, n] / np.sqrt(head_dim) + bias[b, n, t, keys]
        logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
        total = np.exp(logits).sum() + (0 if sinks is None else np.exp(sinks[n]))
        if total:
            out[b, t, n] = np.exp(logits) @ v[b, keys, shared] / total
            lse[b, t, n] = np.log(total)
    return out, lse


def may_attend(b, t, s, mask, segment_ids, positions):
    q_position, kv_position = (t, s) if positions is None else (positions[0][b, t], positions[1][b, s])
    before, after = mask.window
    return not (
        (mask.causal and kv_position > q_position and kv_position >= (mask.prefix or 0))
        or (mask.chunk is not None and kv_position // mask.chunk != q_position // mask.chunk)
        or (before is not None and kv_position < q_position - before)
        or (after is not None and kv_position > q_position + after)
        or (segment_ids is not None and segment_ids[0][b, t] != segment_ids[1][b, s])
        or (segment_ids is not None and segment_ids[1][b, s] == 0)
    )


def arrays(seed, batch=2, q_length=5, kv_length=5, heads=4, kv_heads=2, v_dim=HEAD_DIM):
    rng = np.random.default_rng(seed)
    shapes = [(q_length, heads, HEAD_DIM), (kv_length, kv_heads, HEAD_DIM), (kv_length, kv_heads, v_dim)]
    return [rng.normal(size=(batch, *shape)).astype(np.float32) for shape in shapes]


@st.composite
def calls(draw):
    side = st.sampled_from([None, 0, 1, 3])
    q_length, kv_length = draw(st.sampled_from([(5, 5), (3, 7), (7, 3), (1, 6)]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))

    def pair(low, high):
        return tuple(rng.integers(low, high, (2, length)).astype(np.int32) for length in (q_length, kv_length))

    causal = draw(st.booleans())
    options = {
        "mask": MaskSpec(
            causal=causal,
            window=(draw(side), draw(side)),
            chunk=draw(st.sampled_from([None, None, 3])),
            prefix=draw(st.sampled_from([None, 2])) if causal else None,
        ),
        "segment_ids": pair(0, 3) if draw(st.booleans()) else None,
        "positions": pair(0, 9) if draw(st.booleans()) else None,
        "soft_cap": draw(st.sampled_from([None, 1.5])),
    }
    heads = kv_heads * group
    trained = arrays(rng, 2, q_length, kv_length, heads, kv_heads, v_dim=draw(st.sampled_from([4, 3])))
    if draw(st.booleans()):
        full = (2, heads, q_length, kv_length)
        trained.append(rng.normal(size=[draw(st.sampled_from([1, size])) for size in full]).astype(np.float32))
        if draw(st.booleans()):
            trained.append(rng.normal(size=heads).astype(np.float32))
    return trained, options, rng


@settings(max_examples=15, deadline=None, derandomize=True)
@given(calls())
def test_equals_naive_with_all_gradients(call):
    trained, options, rng = call
    names = ("q", "k", "v", "bias", "sinks")[: len(trained)]
    weights = rng.normal(size=(*trained[0].shape[:3], trained[2].shape[3]))

    def total(o, lse):
        return (o * weights).sum() + 0.1 * (lse * (lse > MASK_VALUE / 2)).sum()

    def loss(trained):
        o, lse = attention(**trained, **options, return_lse=True)
        return total(o, lse), (o, lse)

    gradients, results = jax.jit(jax.grad(loss, has_aux=True))(dict(zip(names, trained, strict=True)))
    wide = [array.astype(np.float64) for array in trained]
    for ours, expected in zip(results, naive(*wide, **options), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-6)
    for i, name in enumerate(names):
        direction = rng.normal(size=trained[i].shape)
        ends = [
            total(*naive(*wide[:i], wide[i] + step * direction, *wide[i + 1 :], **options)) for step in (1e-5, -1e-5)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradients[name] * direction), slope, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("positions", [None, (3, 1), "arrays"])
def test_relative_bias_and_alibi_equal_a_general_bias(positions):
    q, k, v = arrays(0, q_length=5, kv_length=7)
    table = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    slopes = np.asarray([0.5, 0.25, 0.125, 0.0625], np.float32)
    if positions == "arrays":
        positions = tuple(np.random.default_rng(2).integers(0, 30, (2, n)) for n in (5, 7))
        relative = positions[1][:, None, :] - positions[0][:, :, None]
    else:
        starts = positions or (0, 0)
        relative = (np.arange(7) + starts[1])[None, None, :] - (np.arange(5) + starts[0])[None, :, None]
    buckets = RelativeBias(8, 12).buckets()[np.clip(relative, -12, 12) + 12]

    def general(table):
        bias = jnp.moveaxis(table[:, buckets], 0, 1) - slopes[:, None, None] * np.abs(relative)[:, None]
        return jnp.sum(jnp.sin(attention(q, k, v, bias=bias)))

    def special(table):
        bias = {"relative_bias": (RelativeBias(8, 12), table), "alibi_slopes": slopes}
        return jnp.sum(jnp.sin(attention(q, k, v, positions=positions, **bias)))

    for ours, expected in zip(*(jax.value_and_grad(f)(table) for f in (special, general)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_to_slopes():
    q, k, v = arrays(0)
    gradient = jax.grad(lambda slopes: attention(q, k, v, alibi_slopes=slopes).sum())(jnp.ones(4))
    assert not gradient.any()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("mask", "theirs"),
    [
        (MaskSpec(), {}),
        (MaskSpec(causal=True), {"is_causal": True}),
        (MaskSpec(window=(2, 1)), {"local_window_size": (2, 1)}),
        (MaskSpec(causal=True, window=(2, None)), {"is_causal": True, "local_window_size": (2, 0)}),
    ],
    ids=str,
)
def test_equals_jax_nn(heads, mask, theirs):
    qkv = arrays(0, q_length=6, kv_length=6, heads=heads[0], kv_heads=heads[1])

    def with_gradients(function):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(function(*qkv))), argnums=(0, 1, 2)))(*qkv)

    ours = with_gradients(lambda *qkv: attention(*qkv, mask=mask))
    expected = with_gradients(lambda *qkv: jax.nn.dot_product_attention(*qkv, **theirs))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-6, rtol=1e-5), ours, expected)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_gradients_equal_finite_differences(soft_cap):
    qkv = arrays(0, q_length=3, kv_length=4)
    run = jax.jit(lambda *qkv: attention(*qkv, mask=MaskSpec(causal=True), soft_cap=soft_cap))
    check_grads(run, qkv, order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 0]] * 2, np.int32)
LEAKS = {
    "causal": {"mask": MaskSpec(causal=True)},
    "before": {"mask": MaskSpec(window=(1, None))},
    "after": {"mask": MaskSpec(window=(None, 2))},
    "segments": {"segment_ids": (SEGMENTS, SEGMENTS)},
    "positions": {"mask": MaskSpec(causal=True), "positions": (np.arange(6)[None, ::-1],) * 2},
}


@pytest.mark.parametrize("options", LEAKS.values(), ids=LEAKS)
def test_nothing_leaks_through_the_mask(options):
    """Another key and value change the rows that may attend to them, and no bit of the others; nor do gradients."""
    q, k, v = arrays(0, q_length=6, kv_length=6)
    positions = options.get("positions")
    positions = None if positions is None else tuple(np.broadcast_to(p, (2, 6)) for p in positions)
    seen = np.asarray(
        [
            [
                may_attend(0, t, s, options.get("mask", MaskSpec()), options.get("segment_ids"), positions)
                for s in range(6)
            ]
            for t in range(6)
        ]
    )
    assert seen.any()
    assert not seen.all()
    run = jax.jit(lambda k, v: attention(q, k, v, **options))
    before = np.asarray(run(k, v))
    for s in range(6):
        changed_k, changed_v = k.copy(), v.copy()
        changed_k[:, s], changed_v[:, s] = 50.0, -1e6
        differs = (np.asarray(run(changed_k, changed_v)) != before).any(axis=(0, 2, 3))
        np.testing.assert_array_equal(differs, seen[:, s])
    jacobian = jax.jacobian(lambda v: run(k, v)[0].sum((1, 2)))(v)[:, 0].sum((2, 3))
    np.testing.assert_array_equal(np.asarray(jacobian) != 0, seen)


def test_rows_without_keys_are_zero_and_pass_no_gradient():
    q, k, v = arrays(0)
    segments = np.asarray([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32)

    def loss(*qkv):
        out = attention(*qkv, mask=MaskSpec(causal=True), segment_ids=(segments, segments))
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    out = np.asarray(out)
    assert not out[segments == 0].any()
    assert out[segments == 1].all()
    for gradient in map(np.asarray, gradients):
        assert np.isfinite(gradient).all()
        assert not gradient[segments == 0].any()


def test_bfloat16_stays_near_float32():
    qkv = [jnp.asarray(array, jnp.bfloat16) for array in arrays(0)]
    out = attention(*qkv, mask=MaskSpec(causal=True))
    assert out.dtype == jnp.bfloat16
    wide = attention(*(array.astype(jnp.float32) for array in qkv), mask=MaskSpec(causal=True))
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=2e-2)


def test_scale_replaces_the_default():
    q, k, v = arrays(0)
    np.testing.assert_allclose(attention(q, k, v, scale=1.0), attention(q * HEAD_DIM**0.5, k, v), atol=1e-6)


def test_dropout_zeroes_probabilities_and_divides_the_others():
    length = HEAD_DIM
    q, k, _ = arrays(0, batch=8, q_length=64, kv_length=length)
    v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], k.shape)  # the output is the probabilities
    kept = attention(q, k, v)
    dropped = attention(q, k, v, dropout_rate=0.25, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, kept / 0.75), rtol=1e-6)
    assert np.mean(dropped == 0) == pytest.approx(0.25, abs=0.02)  # 8192 draws: 0.005 is one standard deviation
    other = attention(q, k, v, dropout_rate=0.25, dropout_key=jax.random.key(1))
    assert ((other == 0) != (dropped == 0)).any()


def test_keys_and_values_are_not_repeated_for_grouped_heads():
    q, k, v = arrays(0, batch=2, q_length=3, kv_length=7, heads=6, kv_heads=2)
    text = jax.jit(jax.grad(lambda *qkv: attention(*qkv).sum(), argnums=(0, 1, 2))).lower(q, k, v).as_text()
    assert "2x2x7x4xf32" in text
    assert "2x6x7x4xf32" not in text
    assert "2x7x6x4xf32" not in text


def test_batch_and_heads_on_a_mesh_need_no_communication():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    placed = NamedSharding(mesh, P("data", None, "tensor"))
    gradient = jax.grad(lambda *qkv: attention(*qkv, mask=MaskSpec(causal=True)).sum(), argnums=(0, 1, 2))
    run = jax.jit(gradient, in_shardings=placed, out_shardings=placed)
    program = run.lower(*arrays(0, batch=4, heads=8, kv_heads=4)).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
