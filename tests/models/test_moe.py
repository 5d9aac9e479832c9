import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.models.feedforward.dispatch import CapacityConfig, DroplessConfig
from t5x_like.models.feedforward.moe import MoE, MoEConfig, glu
from t5x_like.models.feedforward.routers import (
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    SigmoidRouterConfig,
    SoftmaxRouterConfig,
)
from t5x_like.models.parameters import InitializerConfig, logical_axes, merge, split, stack_modules
from tests import toy

BATCH, LENGTH, EMBED, MLP, EXPERTS = 4, 8, 16, 12, 6


def build(dtype=jnp.float32, key=0, **config) -> MoE:
    config = MoEConfig(**{"num_experts": EXPERTS, "experts_per_token": 2, "d_ff": MLP, **config})
    init = InitializerConfig(stddev=0.3).build()
    moe = MoE(config, toy.layer_spec(EMBED, init, dtype), jax.random.key(key))
    for layer in (moe.up, moe.gate, moe.down):
        if layer is not None and layer.bias is not None:
            layer.bias[...] = init(jax.random.key(9), layer.bias.shape, 1, 1)
    return moe


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, EMBED))


@pytest.fixture(scope="module")
def is_token():
    return jax.random.uniform(jax.random.key(2), (BATCH, LENGTH)) > 0.3


TOKEN_IDS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 11


def outputs_of_all_experts(moe, x):
    """[experts, batch, length, embed]: every expert on every token."""

    def layer(layer, x):
        y = jnp.einsum("ebtd,edf->ebtf", x, layer.kernel[...])
        return y if layer.bias is None else y + layer.bias[...][:, None, None]

    x = jnp.broadcast_to(x, (EXPERTS, *x.shape))
    up = layer(moe.up, x)
    hidden = jax.nn.relu(up) if moe.gate is None else glu(moe.config.activation, layer(moe.gate, x), up)
    return layer(moe.down, hidden)


def dense_weights(moe, x, is_token):
    """[experts, batch, length]: by which the outputs of all experts are multiplied, 0 for most."""
    config, logits = moe.config, moe.router(x, token_ids=TOKEN_IDS)
    flat = logits.reshape(-1, EXPERTS)
    if isinstance(config.router, ExpertChoiceRouterConfig):
        groups = flat.reshape(-1, config.router.group_size, EXPERTS)
        weights = jax.nn.softmax(groups) * is_token.reshape(*groups.shape[:2], 1)
        capacity = config.router.group_size * config.experts_per_token // EXPERTS
        threshold = -jnp.sort(-weights, axis=1)[:, capacity - 1 : capacity]
        weights = jnp.where(weights >= threshold, weights, 0)
    else:
        bias = None if moe.router.balance_bias is None else moe.router.balance_bias[...]
        experts, factors = config.router.choose(flat, bias, config.experts_per_token)
        weights = jnp.sum(jax.nn.one_hot(experts, EXPERTS) * factors[..., None], axis=1)
        weights = weights * is_token.reshape(-1, 1)
    return jnp.moveaxis(weights.reshape(*logits.shape), -1, 0)


def assert_close(ours, expected):
    size = max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(ours / size, expected / size, atol=1e-5)


CASES = {
    "gated": {},
    "biases, relu, one expert": {"use_bias": True, "gated": False, "activation": "relu", "experts_per_token": 1},
    "clamped SwiGLU": {"use_bias": True, "activation": "clamped_swiglu", "router": SoftmaxRouterConfig(use_bias=True)},
    "sigmoid, groups": {"router": SigmoidRouterConfig(num_groups=3, groups_per_token=2, scaling=2.5)},
    "all experts": {"experts_per_token": EXPERTS, "router": SoftmaxRouterConfig(renormalize=False)},
    "hash": {"router": HashRouterConfig()},
    "expert choice": {"router": ExpertChoiceRouterConfig(group_size=24 // 3), "experts_per_token": 3},
    "large capacity": {"dispatch": CapacityConfig(capacity_factor=EXPERTS, group_size=16), "use_bias": True},
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_weighted_sum_over_all_experts(case, padded, x, is_token):
    graphdef, params = split(build(**case))
    mask = is_token if padded else None

    def ours(params, x):
        y, stats = merge(graphdef, params)(x, toy.context(x, token_ids=TOKEN_IDS, is_token=mask))
        return jnp.sum(jnp.sin(y)), (y, stats)

    def dense(params, x):
        moe = merge(graphdef, params)
        weights = dense_weights(moe, x, is_token if padded else jnp.ones_like(is_token))
        y = jnp.einsum("ebtd,ebt->btd", outputs_of_all_experts(moe, x), weights)
        return jnp.sum(jnp.sin(y)), y

    gradients, (y, stats) = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(params, x)
    expected_gradients, expected = jax.jit(jax.grad(dense, (0, 1), has_aux=True))(params, x)
    jax.tree.map(assert_close, (y, gradients), (expected, expected_gradients))
    np.testing.assert_allclose(stats.load.sum(), 1, rtol=1e-6)
    if "router" not in case or not isinstance(case["router"], ExpertChoiceRouterConfig):
        assert stats.dropped == 0


def test_shared_perceptron_is_added_with_its_gate(x, is_token):
    moe = build(shared_d_ff=20, shared_gate=True)
    with_shared, _ = moe(x, toy.context(x, is_token=is_token))
    expected = moe.shared(x, toy.context(x))[0] * jax.nn.sigmoid(moe.shared_gate(x)) * is_token[..., None]
    moe.shared_gate = moe.shared = None
    np.testing.assert_allclose(with_shared, moe(x, toy.context(x, is_token=is_token))[0] + expected, atol=1e-5)


def test_statistics_are_their_definitions_over_real_tokens(x, is_token):
    moe = build()
    _, stats = moe(x, toy.context(x, is_token=is_token))
    logits = moe.router(x)[is_token]
    probabilities = np.asarray(jax.nn.softmax(logits))
    chosen = np.bincount(np.argsort(-probabilities, axis=1)[:, :2].reshape(-1), minlength=EXPERTS)
    share = chosen / len(logits)
    np.testing.assert_allclose(stats.load, share / 2, rtol=1e-5)
    np.testing.assert_allclose(stats.load_balance, EXPERTS * np.sum(share * probabilities.mean(0)), rtol=1e-5)
    np.testing.assert_allclose(stats.z_loss, np.mean(jax.nn.logsumexp(logits, axis=1) ** 2), rtol=1e-5)
    entropies = -np.sum(probabilities * np.log(probabilities), axis=1)
    np.testing.assert_allclose(stats.entropy, entropies.mean(), rtol=1e-5)
    assert all(
        a.dtype == jnp.float32
        for a in build(dtype=jnp.bfloat16)(x.astype(jnp.bfloat16), toy.context(x.astype(jnp.bfloat16)))[1]
    )


def test_an_even_router_has_a_load_balance_loss_of_experts_per_token(x):
    moe = build(router=HashRouterConfig(), num_experts=2)
    np.testing.assert_allclose(moe(x, toy.context(x, token_ids=TOKEN_IDS))[1].load_balance, 2, rtol=1e-5)
    assert HashRouterConfig().scores(moe.router(x, token_ids=TOKEN_IDS)).log_normalizer.sum() == 0


def test_tokens_beyond_the_capacity_get_nothing_and_padding_takes_no_place(x):
    """One expert for all, two places for each half of a sequence."""
    moe = build(
        num_experts=2,
        experts_per_token=1,
        router=SoftmaxRouterConfig(use_bias=True),
        dispatch=CapacityConfig(capacity_factor=1.0, group_size=4, min_capacity=1),
    )
    moe.router.bias[...] = jnp.array([100.0, 0.0])
    is_token = jnp.ones((BATCH, LENGTH), bool).at[:, 0].set(False)
    y, stats = moe(x, toy.context(x, is_token=is_token))
    served = np.asarray(jnp.any(y != 0, axis=-1))
    np.testing.assert_array_equal(served, [[False, True, True, False, True, True, False, False]] * BATCH)
    np.testing.assert_allclose(stats.dropped, 3 / 7, rtol=1e-6)
    np.testing.assert_allclose(stats.load, [1, 0])


def test_expert_choice_counts_the_tokens_that_no_expert_took(x):
    moe = build(router=ExpertChoiceRouterConfig(group_size=BATCH * LENGTH), experts_per_token=1)
    y, stats = moe(x, toy.context(x))
    left = jnp.mean(jnp.all(y == 0, axis=-1))
    assert left > 0
    np.testing.assert_allclose(stats.dropped, left, rtol=1e-6)
    np.testing.assert_allclose(stats.load, 1 / EXPERTS, rtol=1e-6)


def test_jitter_acts_with_a_key_only_and_on_the_router_only(x):
    moe = build(jitter=0.5, experts_per_token=EXPERTS, router=SoftmaxRouterConfig(renormalize=True))
    plain, noisy = moe(x, toy.context(x))[0], moe(x, toy.context(x, dropout_key=jax.random.key(3)))[0]
    assert jnp.abs(noisy - plain).max() > 1e-3
    np.testing.assert_array_equal(
        plain, build(experts_per_token=EXPERTS)(x, toy.context(x, dropout_key=jax.random.key(3)))[0]
    )


def test_it_runs_stacked_in_a_scan(x):
    """As in a stack of layers: parameters and statistics have a leading dim."""
    modules = [build(key=i, router=SigmoidRouterConfig()) for i in range(2)]
    stacked = stack_modules(lambda key: modules[0], jax.random.split(jax.random.key(0)))
    assert logical_axes(stacked)["up"]["kernel"] == ("layers", "expert", "embed", "mlp")
    assert logical_axes(stacked)["router"]["balance_bias"] == ("layers", "router")
    graphdef, _ = split(stacked)
    params = jax.tree.map(lambda *a: jnp.stack(a), *(split(module)[1] for module in modules))
    y, stats = jax.lax.scan(lambda x, params: merge(graphdef, params)(x, toy.context(x)), x, params)
    expected, first = modules[0](x, toy.context(x))
    expected, second = modules[1](expected, toy.context(x))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(stats.load, [first.load, second.load], atol=1e-6)


@pytest.mark.parametrize("dispatch", [DroplessConfig(), CapacityConfig(capacity_factor=6.0)], ids=["sorted", "places"])
def test_bfloat16_is_near_float32(dispatch, x):
    exact, near = (
        build(dispatch=dispatch)(x, toy.context(x))[0],
        build(dispatch=dispatch, dtype=jnp.bfloat16)(x, toy.context(x))[0],
    )
    assert near.dtype == jnp.bfloat16
    np.testing.assert_allclose(near.astype(jnp.float32), exact, atol=0.05 * jnp.abs(exact).max())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"experts_per_token": 7}, r"experts_per_token is 7, but there are 6 experts"),
        ({"num_experts": 0}, r"MoEConfig\.num_experts is 0"),
        ({"router": SoftmaxRouterConfig(num_groups=4)}, r"num_groups \(4\) does not divide MoEConfig\.num_experts"),
        ({"router": SigmoidRouterConfig(num_groups=6)}, r"one expert per group"),
        ({"experts_per_token": 3, "router": SoftmaxRouterConfig(num_groups=3)}, r"hold 2 experts: raise groups_per"),
        (
            {"router": ExpertChoiceRouterConfig(), "dispatch": CapacityConfig()},
            r"CapacityConfig.* with ExpertChoiceRouterConfig",
        ),
        ({"bias_update_rate": 1e-3}, r"SoftmaxRouterConfig has no balance bias: set balance_bias"),
        ({"jitter": 0.1, "router": HashRouterConfig()}, r"jitter is set with HashRouterConfig"),
        ({"jitter": 1.0}, r"jitter is 1.0"),
        ({"load_balance_weight": -1.0}, r"load_balance_weight is -1.0"),
        ({"shared_gate": True}, r"shared_gate is set without shared_d_ff"),
        ({"activation": "clamped_swiglu", "gated": False}, r"needs gated=True"),
    ],
)
def test_impossible_mixtures_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        build(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: CapacityConfig(capacity_factor=0.0), r"capacity_factor is 0.0"),
        (lambda: CapacityConfig(group_size=0), r"group_size is 0"),
        (lambda: DroplessConfig(buffer_factor=0.5), r"buffer_factor is 0.5: below 1"),
    ],
)
def test_impossible_dispatches_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        config()
