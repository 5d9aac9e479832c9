"""Losses on a linear head: against optax, plain JAX, and themselves on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like.errors import UserError
from t5x_like.kernels.cross_entropy import cross_entropy, squared_error

TOKENS, EMBED, VOCAB = 22, 8, 37


def inputs(dtype=jnp.float32, scale=1.0, vocab=VOCAB):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(TOKENS, EMBED)) * scale, dtype)
    head = jnp.asarray(rng.normal(size=(vocab, EMBED)), dtype)
    labels = jnp.asarray(rng.integers(0, vocab, TOKENS), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0], TOKENS), jnp.float32)
    return x, head, labels, weights


def plain(x, head, labels, weights, *, z_loss=0.0, label_smoothing=0.0, soft_cap=None):
    """(loss, z_loss) with the logits of all tokens at once, by optax; float32."""
    logits = x.astype(jnp.float32) @ head.astype(jnp.float32).T
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, len(head)), label_smoothing)
    loss = optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(loss * weights), jnp.sum(z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2 * weights)


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(1, np.abs(e).max()))


def value_and_gradients(loss, x, head, *rest, **options):
    """(sums, gradients of 3 * objective): the factor shows that the incoming cotangent is used."""

    def scaled(x, head):
        sums = loss(x, head, *rest, **options)
        return 3 * sums.objective, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(x, head)
    return sums, gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"z_loss": 1e-2},
        {"label_smoothing": 0.1},
        {"soft_cap": 2.0},
        {"z_loss": 1e-2, "label_smoothing": 0.2, "soft_cap": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_size", [5, 11, 64])
def test_equals_optax(options, chunk_size):
    x, head, labels, weights = inputs()
    sums, gradients = value_and_gradients(cross_entropy, x, head, labels, weights, chunk_size=chunk_size, **options)
    expected = plain(x, head, labels, weights, **options)
    assert_close((sums.loss, sums.z_loss, sums.objective), (*expected, sum(expected)), 1e-6)
    assert_close(
        gradients, jax.grad(lambda x, head: 3 * sum(plain(x, head, labels, weights, **options)), (0, 1))(x, head), 1e-5
    )
    correct = (jnp.argmax(x @ head.T, axis=-1) == labels) * weights
    assert (sums.weight, sums.correct) == (weights.sum(), correct.sum())


def test_integer_labels_and_evaluation_equal_optax():
    x, head, labels, weights = inputs()
    expected = optax.softmax_cross_entropy_with_integer_labels(x @ head.T, labels) @ weights
    sums = jax.jit(lambda *a: cross_entropy(*a, chunk_size=8))(x, head, labels, weights)
    assert_close((sums.loss, sums.objective), (expected, expected), 1e-6)


@pytest.mark.parametrize("chunk_size", [5, 64])
@pytest.mark.parametrize("head_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_as_good_as_its_inputs(chunk_size, head_dtype):
    x, head, labels, weights = inputs(jnp.bfloat16)
    head = head.astype(head_dtype)
    sums, gradients = value_and_gradients(cross_entropy, x, head, labels, weights, z_loss=1e-2, chunk_size=chunk_size)
    expected = plain(x, head, labels, weights, z_loss=1e-2)
    assert_close((sums.loss, sums.z_loss), expected, 1e-5)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, head_dtype]
    wide = x.astype(jnp.float32), head.astype(jnp.float32)
    assert_close(
        gradients, jax.grad(lambda x, head: 3 * sum(plain(x, head, labels, weights, z_loss=1e-2)), (0, 1))(*wide), 1e-2
    )


def test_gradient_of_a_bfloat16_head_is_accumulated_in_float32():
    """Tokens that pull a little each: a bfloat16 sum stops growing at 256 times one token's share."""
    tokens = 2048
    x, head = jnp.ones((tokens, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.bfloat16)
    labels, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)
    gradient = jax.grad(lambda head: cross_entropy(x, head, labels, weights, chunk_size=1).objective)(head)
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[-tokens / 2], [tokens / 2]])


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_extreme_logits_stay_finite(chunk_size):
    x, head, labels, weights = inputs(scale=1e4)
    sums, gradients = value_and_gradients(cross_entropy, x, head, labels, weights, chunk_size=chunk_size)
    expected = plain(x, head, labels, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, gradients)))
    assert_close(sums.loss, expected[0], 1e-6)
    assert_close(gradients, jax.grad(lambda x, h: 3 * plain(x, h, labels, weights)[0], (0, 1))(x, head), 1e-5)


def test_tokens_of_weight_zero_do_not_count_whatever_their_label():
    x, head, labels, weights = inputs()
    weights = weights.at[3].set(0)
    results = [
        value_and_gradients(cross_entropy, x, head, labels.at[3].set(label), weights, chunk_size=8)
        for label in (0, -100, VOCAB)
    ]
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], result)


def test_equal_logits_are_not_correct():
    x, head, labels, weights = inputs()
    assert cross_entropy(x, jnp.zeros_like(head), labels, weights).correct == 0


@pytest.mark.parametrize("field", ["loss", "z_loss", "weight", "correct"])
def test_only_the_objective_carries_a_gradient(field):
    x, head, labels, weights = inputs()
    gradient = jax.grad(lambda x: getattr(cross_entropy(x, head, labels, weights, z_loss=1.0), field))(x)
    assert not gradient.any()


def test_weights_receive_no_gradient():
    x, head, labels, weights = inputs()
    assert not jax.grad(lambda weights: cross_entropy(x, head, labels, weights).objective)(weights).any()


@pytest.mark.parametrize(("chunk_size", "loops"), [(TOKENS, 0), (TOKENS - 1, 1)])
def test_a_single_chunk_compiles_without_a_loop(chunk_size, loops):
    x, head, labels, weights = inputs()
    gradient = jax.jit(jax.grad(lambda x: cross_entropy(x, head, labels, weights, chunk_size=chunk_size).objective))
    assert gradient.lower(x).compile().as_text().count(" while(") == loops


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_does_not_grow_with_tokens_times_vocab(differentiate):
    def temporary_bytes(tokens):
        x, head = jax.ShapeDtypeStruct((tokens, 4), jnp.float32), jax.ShapeDtypeStruct((4096, 4), jnp.float32)
        labels, weights = jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((tokens,), jnp.float32)

        def objective(x, head, labels, weights):
            return cross_entropy(x, head, labels, weights, chunk_size=64).objective

        function = jax.grad(objective, (0, 1)) if differentiate else objective
        return jax.jit(function).lower(x, head, labels, weights).compile().memory_analysis().temp_size_in_bytes

    logits_of_one_chunk = 64 * 4096 * 4
    assert temporary_bytes(2048) - temporary_bytes(256) < logits_of_one_chunk / 4


def test_evaluation_makes_no_gradient():
    """The products of a chunk: one in evaluation, three with the gradients, none for a second forward pass."""
    x, head, labels, weights = inputs()

    def objective(x, head):
        return cross_entropy(x, head, labels, weights, chunk_size=8).objective

    def dots(function):
        return jax.jit(function).lower(x, head).as_text().count("dot_general")

    assert (dots(objective), dots(jax.grad(objective, (0, 1)))) == (1, 3)


def mesh_gradients(vocab_axis):
    """Sums and gradients under a shard_map over data, with the vocabulary left to the compiler."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def local(x, head, labels, weights):
        sums = cross_entropy(x, head, labels, weights, z_loss=1e-2, chunk_size=2)
        return jax.tree.map(lambda value: lax.psum(value, "data"), sums)

    rows = P("data")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, P(), rows, rows), out_specs=P(), axis_names={"data"}, check_vma=True
    )

    def loss(x, head, labels, weights):
        sums = sharded(x, head, labels, weights)
        return 3 * sums.objective, sums

    place = [NamedSharding(mesh, spec) for spec in (rows, P(vocab_axis), rows, rows)]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), in_shardings=place)


@pytest.mark.parametrize("vocab_axis", [None, "tensor"])
def test_equal_on_a_mesh(vocab_axis):
    x, head, labels, weights = inputs(vocab=38)
    x, labels, weights = x[:20], labels[:20], weights[:20]  # five tokens a device: an uneven last chunk
    (_, sums), gradients = mesh_gradients(vocab_axis)(x, head, labels, weights)
    expected = value_and_gradients(cross_entropy, x, head, labels, weights, z_loss=1e-2)
    assert_close((sums, gradients), expected, 1e-5)


def test_a_sharded_vocabulary_is_never_gathered():
    x, head, labels, weights = inputs(vocab=38)
    program = mesh_gradients("tensor").lower(x[:20], head, labels[:20], weights[:20]).compile().as_text()
    assert "all-gather" not in program
    assert not re.search(r"[\[,]38[,\]]", program)


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_squared_error_equals_its_formula(chunk_size):
    """Hui & Belkin 2021, section 3: (k (f_label - M)^2 + sum of the other f_i^2) / C."""
    x, head, labels, weights = inputs()

    def formula(x, head):
        logits = x @ head.T
        one_hot = jax.nn.one_hot(labels, VOCAB)
        terms = one_hot * 5 * (logits - 10) ** 2 + (1 - one_hot) * logits**2
        return terms.sum(axis=1) @ weights / VOCAB

    options = {"label_weight": 5.0, "label_value": 10.0, "chunk_size": chunk_size}
    sums, gradients = value_and_gradients(squared_error, x, head, labels, weights, **options)
    assert_close((sums.objective, sums.loss, sums.z_loss), (formula(x, head), formula(x, head), 0.0), 1e-6)
    assert_close(gradients, jax.grad(lambda x, head: 3 * formula(x, head), (0, 1))(x, head), 1e-5)
    assert_close(squared_error(x, head, labels, weights).loss, optax_squared_error(x, head, labels, weights), 1e-6)


def optax_squared_error(x, head, labels, weights):
    return optax.squared_error(x @ head.T, jax.nn.one_hot(labels, VOCAB)).mean(axis=1) @ weights


def test_an_empty_chunk_is_refused():
    with pytest.raises(UserError, match="0 tokens at a time: set chunk_size"):
        cross_entropy(*inputs(), chunk_size=0)
