"""Optimizers against optax's own, against plain formulas, and scanned against unrolled layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from t5x_like.configurable import players_of
from t5x_like.errors import UserError
from t5x_like.training import optimizers
from t5x_like.training.optimizers import OptimizerConfig, build_optimizer, schedule_of, state_axes
from t5x_like.training.schedules import ConstantSchedule, CosineSchedule

LAYERS = 2
LAYER_AXES = {
    "query": {"kernel": ("embed", "heads", "head_dim"), "bias": ("heads", "head_dim")},
    "output": {"kernel": ("heads", "head_dim", "embed")},
    "up": {"kernel": ("embed", "mlp")},
    "norm": {"scale": ("norm",)},
}
SIZES = {"embed": 8, "heads": 2, "head_dim": 3, "mlp": 12, "norm": 8, "vocab": 20}
IS_AXES = {"is_leaf": lambda x: isinstance(x, tuple)}
UNROLLED_AXES = {"embedding": ("vocab", "embed"), "layers": dict.fromkeys(range(LAYERS), LAYER_AXES)}
SCANNED_AXES = {
    "embedding": ("vocab", "embed"),
    "layers": jax.tree.map(lambda names: ("layers", *names), LAYER_AXES, **IS_AXES),
}
ALGORITHMS = [
    optimizers.AdamWConfig(),
    optimizers.AdamWConfig(parameter_scale=True),
    optimizers.AdamConfig(),
    optimizers.AdafactorConfig(min_dim_size_to_factor=6, weight_decay=0.1),
    optimizers.SGDConfig(momentum=0.9, nesterov=True),
    optimizers.RMSPropConfig(momentum=0.9),
    optimizers.LionConfig(),
    optimizers.MuonConfig(),
]
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)


def random_tree(seed, axes=UNROLLED_AXES):
    generator = np.random.default_rng(seed)

    def draw(names):
        return generator.normal(size=[SIZES[name] for name in names]).astype(np.float32)

    return jax.tree.map(draw, axes, **IS_AXES)


def scanned(params):
    layers = jax.tree.map(lambda *leaves: np.stack(leaves), *params["layers"].values())
    return {**params, "layers": layers}


def merged_heads(params):
    """Attention kernels as the matrices that they are."""
    merge = {"query": lambda x: x.reshape(x.shape[0], -1), "output": lambda x: x.reshape(-1, x.shape[-1])}
    return {
        **params,
        "layers": {
            i: {
                name: {**part, "kernel": merge[name](part["kernel"])} if name in merge else part
                for name, part in layer.items()
            }
            for i, layer in params["layers"].items()
        },
    }


def trained(optimizer, params, grads):
    """Returns the parameters after one jitted update for each of `grads`."""
    params = jax.tree.map(jnp.asarray, params)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for grad in grads:
        params, state = step(params, state, grad)
    assert step._cache_size() == 1
    return params


def config_of(algorithm, **fields):
    schedule = CosineSchedule(learning_rate=0.05, warmup_steps=2)
    return OptimizerConfig(**{"algorithm": algorithm, "schedule": schedule, "clip_norm": None, **fields})


def assert_trees_close(actual, expected, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), actual, expected)


PARAMS = random_tree(0)
GRADS = [random_tree(seed) for seed in (1, 2, 3)]
IS_MATRIX = jax.tree.map(lambda names: len(names) > 1 and names != ("heads", "head_dim"), UNROLLED_AXES, **IS_AXES)
LEARNING_RATE = schedule_of(config_of(ALGORITHMS[0]), 10)


def optax_adafactor(learning_rate):
    """optax's, in which weight decay alone is not multiplied by the learning rate."""
    parts = [
        optax.adafactor(learning_rate=None, min_dim_size_to_factor=6),
        optax.add_decayed_weights(-0.1, IS_MATRIX),
        optax.scale_by_schedule(learning_rate),
    ]
    return optax.chain(*parts)


def optax_muon(learning_rate):
    """optax's for the matrices in layers; AdamW for the rest, of which only the embedding decays."""
    labels = jax.tree.map(lambda is_matrix: "muon" if is_matrix else "adam", IS_MATRIX)
    parts = {
        "muon": muon(learning_rate, weight_decay=0.1, consistent_rms=0.2),
        "adam": optax.adamw(learning_rate, b2=0.95, weight_decay=0.1, mask={**IS_MATRIX, "layers": False}),
    }
    return optax.partition(parts, {**labels, "embedding": "adam"})


OPTAX = [
    (ALGORITHMS[0], optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=0.1, mask=IS_MATRIX)),
    (ALGORITHMS[2], optax.adam(LEARNING_RATE)),
    (ALGORITHMS[3], optax_adafactor(LEARNING_RATE)),
    (ALGORITHMS[4], optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True)),
    (ALGORITHMS[6], optax.lion(LEARNING_RATE, weight_decay=0.1, mask=IS_MATRIX)),
    (ALGORITHMS[7], optax_muon(LEARNING_RATE)),
]


@pytest.mark.parametrize(("algorithm", "reference"), OPTAX, ids=lambda x: type(x).__name__)
def test_equals_optax_on_unrolled_matrices(algorithm, reference):
    ours = trained(build_optimizer(config_of(algorithm), UNROLLED_AXES, 10), PARAMS, GRADS)
    expected = trained(reference, merged_heads(PARAMS), [merged_heads(grad) for grad in GRADS])
    assert_trees_close(merged_heads(ours), expected)


@each_algorithm
def test_scanned_layers_train_like_unrolled_ones(algorithm):
    config = config_of(algorithm, l2_penalty=0.01, clip_norm=1.0)
    unrolled = trained(build_optimizer(config, UNROLLED_AXES, 10), PARAMS, GRADS)
    stacked = trained(build_optimizer(config, SCANNED_AXES, 10), scanned(PARAMS), [scanned(grad) for grad in GRADS])
    assert_trees_close(stacked, scanned(unrolled))


@each_algorithm
def test_a_restored_state_continues_bit_for_bit(algorithm):
    optimizer = build_optimizer(config_of(algorithm, clip_norm=1.0), SCANNED_AXES, 10)
    update = jax.jit(optimizer.update)
    params, grads = scanned(PARAMS), [scanned(grad) for grad in GRADS]
    state = optimizer.init(params)
    for grad in grads[:2]:
        _, state = update(grad, state, params)
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(optimizer.init, params)), leaves)
    expected, actual = (update(grads[2], s, params)[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_adamw_equals_nanogpt():
    """PyTorch's clip_grad_norm_ and AdamW with the settings of nanoGPT's train_shakespeare_char."""
    config = config_of(optimizers.AdamWConfig(b1=0.9, b2=0.99, weight_decay=0.1), clip_norm=1.0)
    actual = trained(build_optimizer(config, SCANNED_AXES, 10), scanned(PARAMS), [scanned(grad) for grad in GRADS])

    params, matrix = (jax.tree.leaves(tree) for tree in (PARAMS, IS_MATRIX))
    first, second = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for t, grads in enumerate(map(jax.tree.leaves, GRADS), 1):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads))
        rate = float(LEARNING_RATE(t - 1))
        for i, grad in enumerate(grads):
            grad = grad * min(1.0, 1.0 / (norm + 1e-6))
            params[i] = params[i] * (1 - rate * 0.1 * matrix[i])
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.99 * second[i] + 0.01 * grad**2
            denominator = np.sqrt(second[i]) / np.sqrt(1 - 0.99**t) + 1e-8
            params[i] = params[i] - rate / (1 - 0.9**t) * first[i] / denominator
    assert_trees_close(actual, scanned(jax.tree.unflatten(jax.tree.structure(PARAMS), params)))


def test_rmsprop_equals_pytorch():
    """The loop of torch.optim.RMSprop's documentation."""
    config = config_of(optimizers.RMSPropConfig(decay=0.9, momentum=0.5))
    actual = trained(build_optimizer(config, UNROLLED_AXES, 10), PARAMS, GRADS)["embedding"]
    param, average, buffer = PARAMS["embedding"], 0.0, 0.0
    for t, grads in enumerate(GRADS):
        average = 0.9 * average + 0.1 * grads["embedding"] ** 2
        buffer = 0.5 * buffer + grads["embedding"] / (np.sqrt(average) + 1e-8)
        param = param - float(LEARNING_RATE(t)) * buffer
    np.testing.assert_allclose(actual, param, rtol=1e-5)


def test_muon_updates_are_orthogonal_and_as_large_as_adams():
    """Per layer and over merged heads: singular values near 1 times the scale (Newton-Schulz leaves 0.7 to 1.2)."""
    config = config_of(optimizers.MuonConfig(weight_decay=0.0), schedule=ConstantSchedule(learning_rate=1.0))
    optimizer = build_optimizer(config, SCANNED_AXES, 10)
    params, grad = scanned(PARAMS), scanned(GRADS[0])
    update = optimizer.update(grad, optimizer.init(params), params)[0]["layers"]["output"]["kernel"]
    for matrix in np.asarray(update).reshape(LAYERS, 6, 8):
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(8))
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.3


@pytest.mark.parametrize(("mask", "biases_decay"), [("matrices", False), ("all", True)])
def test_decay_and_penalties_leave_vectors_alone_unless_asked(mask, biases_decay):
    schedule = ConstantSchedule(learning_rate=0.5)
    fields = {"schedule": schedule, "weight_decay_mask": mask, "l1_penalty": 0.3, "l2_penalty": 0.2}
    optimizer = build_optimizer(config_of(optimizers.SGDConfig(), **fields), SCANNED_AXES, 10)
    params = scanned(PARAMS)
    actual = trained(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])

    def penalty(p):
        return 0.3 * jnp.sum(jnp.abs(p)) + 0.2 / 2 * jnp.sum(p**2)

    layers, after = params["layers"], actual["layers"]
    kernel = layers["query"]["kernel"]
    np.testing.assert_allclose(after["query"]["kernel"], kernel - 0.5 * jax.grad(penalty)(kernel), rtol=1e-5)
    for vector, now in (
        (layers["query"]["bias"], after["query"]["bias"]),
        (layers["norm"]["scale"], after["norm"]["scale"]),
    ):
        expected = vector - 0.5 * jax.grad(penalty)(vector) if biases_decay else vector
        np.testing.assert_allclose(now, expected, rtol=1e-5)


@each_algorithm
def test_state_axes_name_every_dim(algorithm):
    optimizer = build_optimizer(config_of(algorithm, clip_norm=1.0), SCANNED_AXES, 10)
    state = jax.eval_shape(optimizer.init, scanned(PARAMS))
    sizes = {**SIZES, "layers": LAYERS}
    seen = []

    def check(x, names):
        assert len(names) == x.ndim
        if "other" not in names and names:
            seen.append(names)
            # Merged heads go by the name of their first dim.
            assert all(size in (sizes[name], 6) for size, name in zip(x.shape, names, strict=True))

    jax.tree.map(check, state, state_axes(state, SCANNED_AXES))
    names_of_params = set(jax.tree.leaves(SCANNED_AXES, **IS_AXES))
    if isinstance(algorithm, optimizers.AdafactorConfig):
        assert {("layers", "embed"), ("layers", "heads"), ("layers", "mlp"), ("vocab",), ("layers", "norm")} <= set(
            seen
        )
        assert ("layers", "embed", "mlp") not in seen
    else:
        assert set(seen) == names_of_params


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optimizers.AdamWConfig(b2=1.0), r"AdamWConfig.b2 must be in \[0, 1\), not 1.0"),
        (lambda: optimizers.LionConfig(weight_decay=-0.1), "LionConfig.weight_decay must be 0 or more"),
        (lambda: optimizers.SGDConfig(nesterov=True), "needs a momentum"),
        (lambda: optimizers.AdafactorConfig(clip_rms=0.0), "clip_rms must be positive"),
        (lambda: config_of(optimizers.AdamConfig(), clip_norm=0.0), "clip_norm must be positive"),
        (lambda: config_of(optimizers.AdamConfig(), weight_decay_mask="all"), "nothing decays"),
        (lambda: build_optimizer(config_of(optimizers.AdamConfig()), SCANNED_AXES, 1), "longer than the run"),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_algorithms_are_all_covered_here():
    ours = {cls for cls in players_of(optimizers.Algorithm) if cls.__module__.startswith("t5x_like.")}
    assert ours == {type(algorithm) for algorithm in ALGORITHMS}
