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


def features(lengths, dims, stretch=1) -> dict[str, list]:
    """What a call may be; `lengths` of queries and keys, `stretch`: factor on the distances in masks and biases."""
    return {
        "lengths": lengths,
        "heads": [(1, 1), (2, 1), (1, 3), (2, 2)],  # of keys, and queries for each
        "dims": dims,
        "mask": [stretched(mask, stretch) for mask in MASKS],
        "segments": ["none", "sorted", "mixed"],
        "positions": ["none", "numbers", "arrays"],
        "bidirectional": [None, False, True],
        "max_distance": [9 * stretch],
        "has_sinks": [False, True],
        "alibi": [None, 1 / stretch],
        "soft_cap": [None, 1.5],
    }


@st.composite
def calls(draw, **grid):
    """Calls drawn at random from `features`."""
    chosen = {name: draw(st.sampled_from(values)) for name, values in features(**grid).items()}
    return make_call(draw(st.integers(0, 10_000)), **chosen)


def covering(**grid) -> list[Call]:
    """So few calls that each feature has each of its values in one of them."""
    rng = np.random.default_rng(0)
    table = features(**grid)
    number = max(map(len, table.values()))
    columns = {name: [values[i % len(values)] for i in rng.permutation(number)] for name, values in table.items()}
    # Position arrays come first, and a relative bias, which they exclude, last.
    columns["positions"].sort()
    columns["bidirectional"].sort(key=lambda value: value is not None)
    return [make_call(i, **{name: column[i] for name, column in columns.items()}) for i in range(number)]


def make_call(
    seed, lengths, heads, dims, mask, segments, positions, bidirectional, max_distance, has_sinks, alibi, soft_cap
) -> Call:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    per_token = lambda high: [rng.integers(0, high, (2, length)).astype(np.int32) for length in lengths]
    num_heads = heads[0] * heads[1]
    trained = {
        "q": normal(2, lengths[0], num_heads, dims[0]),
        "k": normal(2, lengths[1], heads[0], dims[0]),
        "v": normal(2, lengths[1], heads[0], dims[1]),
    }
    options = {"mask": mask, "soft_cap": soft_cap}
    if segments == "sorted":
        options["segment_ids"] = tuple(np.sort(ids, axis=1)[:, ::-1] for ids in per_token(4))
    if segments == "mixed":
        options["segment_ids"] = tuple(per_token(3))
    if positions == "arrays" and bidirectional is None:
        options["positions"] = tuple(per_token(max_distance))
    elif positions != "none":
        options["positions"] = (jnp.int32(rng.integers(9)), int(rng.integers(9)))
    if bidirectional is not None:
        options["relative_bias"] = RelativeBias(8, max_distance, bidirectional=bidirectional)
        trained["table"] = normal(num_heads, 8)
    if has_sinks:
        trained["sinks"] = normal(num_heads)
    if alibi is not None:
        options["alibi_slopes"] = np.abs(normal(num_heads)) * np.float32(alibi)
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
    backend: str,
    lengths: tuple[int, int],
    heads: tuple[int, int] = (4, 2),
    options: dict[str, Any] = EVERYTHING,
    draws: int = 3,
):
    """Errors of bfloat16 are no more than 1.5 times those of the reference, by the norm of each array over all draws.

    The errors of a few numbers, as of the gradient of sinks, are mostly chance: one draw will not do for those.
    """
    exact, theirs = (runner(options, "reference", dtype) for dtype in (np.float32, jnp.bfloat16))
    ours = runner(options, backend, jnp.bfloat16)
    squares = collections.defaultdict(lambda: np.zeros(2))
    shapes = {"q": (2, lengths[0], heads[0], 64)} | dict.fromkeys("kv", (2, lengths[1], heads[1], 64))
    if "relative_bias" in options:
        shapes |= {"table": (heads[0], 8), "sinks": heads[:1]}
    for seed in range(draws):
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
