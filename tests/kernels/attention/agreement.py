"""Calls of attention drawn at random, and whether a backend does with them what the reference does."""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.attention.logits import MASK_VALUE


class Call(NamedTuple):
    """Arrays that are trained, and the other arguments; `relative_bias` lacks its table, which is trained."""

    trained: dict[str, np.ndarray]
    options: dict[str, Any]


MASKS = [
    MaskSpec(),
    MaskSpec(causal=True),
    MaskSpec(causal=True, prefix=5),
    MaskSpec(window=(3, 1)),
    MaskSpec(causal=True, window=(6, None)),
    MaskSpec(causal=True, chunk=7),
    MaskSpec(chunk=4, window=(None, 2)),
]


@st.composite
def calls(draw, lengths, dims=((4, 4), (4, 6)), stretch=1):
    """`lengths`: pairs of query and key length; `stretch`: factor on the distances in masks and biases."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    q_length, kv_length = draw(st.sampled_from(lengths))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    head_dim, v_dim = draw(st.sampled_from(dims))
    heads, batch = kv_heads * group, 2
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    trained = {
        "q": normal(batch, q_length, heads, head_dim),
        "k": normal(batch, kv_length, kv_heads, head_dim),
        "v": normal(batch, kv_length, kv_heads, v_dim),
    }
    options = {"mask": stretched(draw(st.sampled_from(MASKS)), stretch)}
    options["segment_ids"] = draw(
        st.sampled_from(
            [
                None,
                tuple(
                    np.sort(rng.integers(0, 4, (batch, n)), axis=1)[:, ::-1].astype(np.int32)
                    for n in (q_length, kv_length)
                ),
                tuple(rng.integers(0, 3, (batch, n)).astype(np.int32) for n in (q_length, kv_length)),
            ]
        )
    )
    kinds = ["none", "numbers", "arrays"]
    has_relative_bias = draw(st.booleans())
    kind = draw(st.sampled_from(kinds[:2] if has_relative_bias else kinds))
    if kind == "numbers":
        options["positions"] = (jnp.int32(rng.integers(9)), int(rng.integers(9)))
    if kind == "arrays":
        options["positions"] = tuple(
            rng.integers(0, 9 * stretch, (batch, n)).astype(np.int32) for n in (q_length, kv_length)
        )
    if has_relative_bias:
        options["relative_bias"] = RelativeBias(8, 9 * stretch, bidirectional=draw(st.booleans()))
        trained["table"] = normal(heads, 8)
    if draw(st.booleans()):
        trained["sinks"] = normal(heads)
    if draw(st.booleans()):
        options["alibi_slopes"] = np.abs(normal(heads)) / stretch
    options["soft_cap"] = draw(st.sampled_from([None, 1.5]))
    return Call(trained, options)


def stretched(mask: MaskSpec, factor: int) -> MaskSpec:
    times = lambda value: None if value is None else value * factor
    return MaskSpec(mask.causal, tuple(map(times, mask.window)), times(mask.chunk), times(mask.prefix))


def run(call: Call, backend: str, dtype=np.float32):
    """Output, log-sum-exp, and the gradients of all trained arrays by a function of both."""
    return runner(call.options, backend, dtype)(call.trained)


def runner(options: dict[str, Any], backend: str, dtype=np.float32):
    """The same as a function of the trained arrays, compiled once."""

    def loss(trained):
        given = dict(options)
        if "table" in trained:
            given["relative_bias"] = (options["relative_bias"], trained["table"])
        arrays = {name: array for name, array in trained.items() if name != "table"}
        o, lse = attention(**arrays, **given, return_lse=True, backend=backend)
        weights = np.random.default_rng(1).normal(size=o.shape).astype(np.float32)
        total = jnp.sum(o.astype(jnp.float32) * weights) + jnp.sum(jnp.where(lse > MASK_VALUE / 2, jnp.sin(lse), 0))
        return total, {"o": o, "lse": lse}

    # Narrow numbers are rounded wherever the program says so, as accelerators do; XLA would leave it out on CPU.
    compiled = jax.jit(jax.grad(loss, has_aux=True), compiler_options={"xla_allow_excess_precision": False})

    def apply(trained):
        narrow = {name: jnp.asarray(array, dtype) if name in "qkv" else array for name, array in trained.items()}
        gradients, results = compiled(narrow)
        return jax.tree.map(lambda array: np.asarray(array, np.float32), {**results, **gradients})

    return apply


def check_agreement(call: Call, backend: str):
    ours, expected = run(call, backend), run(call, "reference")
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array, atol=5e-6 * max(1, np.abs(array).max()), err_msg=name)


EVERYTHING = {"mask": MaskSpec(causal=True), "relative_bias": RelativeBias(8, 32), "soft_cap": 5.0}


def check_bfloat16(
    backend: str, lengths: tuple[int, int], heads: tuple[int, int] = (4, 2), options: dict[str, Any] = EVERYTHING
):
    """Errors of bfloat16 are no more than 1.5 times those of the reference, by the norm of each array over three draws.

    Several draws, because the errors of a few numbers, as in the gradient of the sinks, are mostly chance.
    """
    exact, theirs = (runner(options, "reference", dtype) for dtype in (np.float32, jnp.bfloat16))
    ours = runner(options, backend, jnp.bfloat16)
    squares = collections.defaultdict(lambda: np.zeros(2))
    shapes = {"q": (2, lengths[0], heads[0], 64), "sinks": heads[:1]}
    shapes |= dict.fromkeys("kv", (2, lengths[1], heads[1], 64))
    if "relative_bias" in options:
        shapes["table"] = (heads[0], 8)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        trained = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        right, *others = (run(trained) for run in (exact, ours, theirs))
        for name, array in right.items():
            squares[name] += [np.sum((other[name] - array) ** 2) for other in others]
    ratios = {name: np.sqrt(ours / theirs) for name, (ours, theirs) in squares.items()}
    assert all(ratio <= 1.5 for ratio in ratios.values()), ratios


def check_leaks(backend: str, options: dict[str, Any], length: int, head_dim: int):
    """Other keys and values of the second half move nothing in the rows of the first half, to the last bit."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, length, 2, head_dim)).astype(np.float32)
    function = jax.jit(lambda k, v: attention(q, k, v, backend=backend, **options))
    half = length // 2
    before = np.asarray(function(k, v))
    k[:, half:], v[:, half:] = 50, -1e6
    after = np.asarray(function(k, v))
    np.testing.assert_array_equal(before[:, :half], after[:, :half])
    assert (before[:, half:] != after[:, half:]).all()
