"""T5's buckets against the formula of Hugging Face transformers, ALiBi against its paper, and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from t5x_like.errors import UserError
from t5x_like.kernels.attention.biases import RelativeBias, alibi, relative_bias

SPECS = [(32, 128, True), (32, 128, False), (8, 20, True), (16, 64, False), (64, 512, True)]


def transformers_bucket(relative, num_buckets, max_distance, bidirectional):
    """T5Attention._relative_position_bucket for one distance, in Python's float64."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = -min(relative, 0)
    max_exact = num_buckets // 2
    if distance < max_exact:
        return bucket + distance
    steps = math.log(distance / max_exact) / math.log(max_distance / max_exact) * (num_buckets - max_exact)
    # float64 falls below whole numbers that float32 meets: 16 / 8 is 2 ** 1, not a bit less
    return bucket + min(max_exact + int(steps + 1e-6), num_buckets - 1)


@pytest.mark.parametrize("spec", SPECS)
def test_buckets_are_those_of_transformers(spec):
    num_buckets, max_distance, bidirectional = spec
    expected = [transformers_bucket(r, *spec) for r in range(-max_distance, max_distance + 1)]
    np.testing.assert_array_equal(RelativeBias(num_buckets, max_distance, bidirectional).buckets(), expected)


def test_known_thresholds_of_t5():
    """Where the buckets of t5-base change: recorded from transformers."""
    buckets = RelativeBias().buckets()[128::-1]
    assert (np.flatnonzero(np.diff(buckets)) + 1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


def test_far_distances_share_the_last_bucket():
    table = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    values = relative_bias(RelativeBias(), table, jnp.asarray([-100_000, -128, 128, 100_000]))
    np.testing.assert_array_equal(values, table[:, [15, 15, 31, 31]])


def test_gradient_of_the_table():
    spec = RelativeBias(8, 12)
    relative = jnp.arange(5)[None] - jnp.arange(6)[:, None]
    table = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    check_grads(lambda table: jnp.sin(relative_bias(spec, table, relative)), (table,), 1, modes=["rev"], rtol=1e-2)
    expected = jax.grad(lambda table: jnp.sum(jnp.sin(table[:, spec.buckets()[relative + 12]])))(table)
    ours = jax.grad(lambda table: jnp.sum(jnp.sin(relative_bias(spec, table, relative))))(table)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_alibi_is_the_matrix_of_the_paper():
    """Figure 3 of Press et al. 2022: 0 on the diagonal, then -1, -2, ... times the slope."""
    relative = np.arange(4)[None] - np.arange(4)[:, None]
    bias = np.asarray(alibi(jnp.float32(0.5), jnp.asarray(relative)))
    np.testing.assert_array_equal(bias[3], [-1.5, -1.0, -0.5, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_buckets": 7}, "num_buckets is 7"),
        ({"num_buckets": 1, "bidirectional": False}, "num_buckets is 1"),
        ({"max_distance": 8}, "max_distance is 8"),
    ],
)
def test_impossible_buckets_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        RelativeBias(**arguments)
