import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.models.feedforward.moe import balanced
from t5x_like.models.feedforward.routers import (
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    SigmoidRouterConfig,
    SoftmaxRouterConfig,
    hash_scores,
)
from t5x_like.models.parameters import InitializerConfig, split

TOKENS, EXPERTS = 40, 8


@pytest.fixture(scope="module")
def logits():
    return jax.random.normal(jax.random.key(0), (TOKENS, EXPERTS))


def test_the_softmax_may_come_before_or_after_the_choice(logits):
    """Mixtral's order and gpt-oss'."""
    experts, weights = SoftmaxRouterConfig().choose(logits, None, 3)
    probabilities, order = jax.lax.top_k(jax.nn.softmax(logits), 3)
    np.testing.assert_array_equal(experts, order)
    np.testing.assert_allclose(weights, probabilities / probabilities.sum(-1, keepdims=True), rtol=1e-6)
    _, weights = SoftmaxRouterConfig(renormalize=False, scaling=2.0).choose(logits, None, 3)
    np.testing.assert_allclose(weights, 2 * probabilities, rtol=1e-6)


@pytest.mark.parametrize("config", [SoftmaxRouterConfig(), SigmoidRouterConfig()], ids=["softmax", "sigmoid"])
def test_the_balance_bias_moves_the_choice_but_not_the_weights(config, logits):
    experts, weights = config.choose(logits, jnp.zeros(EXPERTS).at[5].set(10.0), 2)
    assert (experts[:, 0] == 5).all()
    values = jnp.exp(logits) if isinstance(config, SoftmaxRouterConfig) else jax.nn.sigmoid(logits)
    chosen = jnp.take_along_axis(values, experts, axis=1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("kind", [SoftmaxRouterConfig, SigmoidRouterConfig])
def test_a_token_stays_in_its_best_groups(kind, logits):
    experts, _ = kind(num_groups=4, groups_per_token=2).choose(logits, None, 3)
    values = np.asarray(jax.nn.softmax(logits) if kind is SoftmaxRouterConfig else jax.nn.sigmoid(logits))
    grouped = values.reshape(TOKENS, 4, 2)
    best = grouped.max(-1) if kind is SoftmaxRouterConfig else grouped.sum(-1)
    groups = np.argsort(-best, axis=1)[:, :2]
    for token in range(TOKENS):
        allowed = [e for e in range(EXPERTS) if e // 2 in groups[token]]
        expected = sorted(allowed, key=lambda e, token=token: -values[token, e])[:3]
        assert experts[token].tolist() == expected


def test_of_equal_experts_the_first_is_chosen():
    experts, weights = SoftmaxRouterConfig().choose(jnp.zeros((2, EXPERTS)), None, 3)
    assert experts.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_hashes_are_fixed_distinct_and_even():
    scores = hash_scores(jnp.arange(20_000), EXPERTS, seed=0)
    experts, weights = HashRouterConfig().choose(scores, None, 2)
    assert (experts[:, 0] != experts[:, 1]).all()
    np.testing.assert_allclose(np.bincount(experts.reshape(-1)) / 5000, 1.0, atol=0.05)
    np.testing.assert_array_equal(weights, 0.5)
    pairs = np.bincount(experts[:, 0] * EXPERTS + experts[:, 1], minlength=EXPERTS**2).reshape(EXPERTS, EXPERTS)
    np.testing.assert_allclose(pairs[~np.eye(EXPERTS, dtype=bool)] * 56 / 20_000, 1.0, atol=0.25)
    np.testing.assert_array_equal(hash_scores(jnp.array([7]), EXPERTS, seed=0)[0], scores[7])
    assert (jnp.argmax(hash_scores(jnp.arange(99), EXPERTS, seed=1), 1) != experts[:99, 0]).sum() > 60


def test_jitter_needs_a_key_and_the_router_is_float32():
    init = InitializerConfig(stddev=1.0).build()
    router = SoftmaxRouterConfig(use_bias=True).build(16, EXPERTS, init=init, key=jax.random.key(0))
    router.bias[...] = jnp.arange(EXPERTS, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 3, 16), jnp.bfloat16)
    plain = router(x, jitter=0.1)
    assert plain.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64) + np.arange(EXPERTS)
    np.testing.assert_allclose(plain, exact, rtol=1e-5, atol=1e-5)
    noisy = router(x, jitter=0.1, key=jax.random.key(2))
    bound = 0.1 * np.abs(np.asarray(x, np.float64)) @ np.abs(router.kernel[...])
    assert (np.abs(noisy - plain) <= bound + 1e-5).all()
    assert (np.abs(noisy - plain) > 0.01 * bound).mean() > 0.8


def test_balancing_moves_every_bias_towards_an_even_load():
    bias = jnp.ones((2, 3))
    load = jnp.array([[0.5, 0.2, 0.3], [1 / 3, 1 / 3, 1 / 3]])
    expected = [[1 - 0.01, 1 + 0.01, 1 + 0.01], [1, 1, 1]]
    np.testing.assert_allclose(balanced(bias, load, 0.01), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SoftmaxRouterConfig(num_groups=0), r"SoftmaxRouterConfig\.num_groups is 0"),
        (lambda: SigmoidRouterConfig(num_groups=2, groups_per_token=3), r"groups_per_token is 3: .* \(2\)"),
        (lambda: SigmoidRouterConfig(scaling=0.0), r"scaling is 0.0: it must be positive"),
        (lambda: ExpertChoiceRouterConfig(group_size=0), r"group_size is 0"),
    ],
)
def test_impossible_routers_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_a_hash_router_without_token_ids_is_refused():
    router = HashRouterConfig().build(16, EXPERTS, init=InitializerConfig().build(), key=jax.random.key(0))
    assert not jax.tree.leaves(split(router)[1])
    with pytest.raises(UserError, match="HashRouterConfig chooses by token"):
        router(jnp.zeros((1, 2, 16)))
