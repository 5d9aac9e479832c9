"""Mixtures of experts on meshes of eight devices: the results of one device, and only the communication meant."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from t5x_like.errors import UserError
from t5x_like.models.feedforward.dispatch import CapacityConfig, DroplessConfig
from t5x_like.models.feedforward.moe import MoE, MoEConfig
from t5x_like.models.feedforward.routers import ExpertChoiceRouterConfig, SigmoidRouterConfig, SoftmaxRouterConfig
from t5x_like.models.parameters import InitializerConfig, logical_axes, merge, split
from t5x_like.sharding.experts import check_experts, tokens_per_group
from t5x_like.sharding.logical import constrain
from t5x_like.sharding.mesh import MESH_AXES
from t5x_like.sharding.placement import Placement
from tests import toy

BATCH, LENGTH, EMBED, MLP, EXPERTS = 16, 8, 16, 24, 8


def mesh_of(**sizes):
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh([sizes.get(axis, 1) for axis in MESH_AXES], MESH_AXES, types)


def build(**config) -> MoE:
    config = MoEConfig(**{"num_experts": EXPERTS, "experts_per_token": 2, "d_ff": MLP, **config})
    init = InitializerConfig(stddev=0.3).build()
    moe = MoE(config, toy.layer_spec(EMBED, init), jax.random.key(0))
    for layer in (moe.up, moe.gate, moe.down):
        if layer.bias is not None:
            layer.bias[...] = init(jax.random.key(9), layer.bias.shape, 1, 1)
    return moe


def inputs(batch=BATCH, length=LENGTH):
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (batch, length, EMBED)
    is_token = jax.random.uniform(keys[2], shape[:2]) > 0.2
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape), is_token


def loss(params, x, graphdef, target, is_token):
    """Of an output per token, and of the statistics that have gradients."""
    x, target = constrain(x, "batch", "length", "embed"), constrain(target, "batch", "length", "embed")
    y, stats = merge(graphdef, params)(x, toy.context(x, is_token=is_token, dropout_key=jax.random.key(7)))
    objective = jnp.sum(y * target) / is_token.size + stats.load_balance + stats.z_loss
    return objective, (y, stats)


def step(moe, arrays, mesh=None, compiled=False):
    """Loss, output, statistics, gradients of parameters and inputs; or the compiled program's text."""
    graphdef, params = split(moe)
    x, target, is_token = arrays
    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    if mesh is None:
        return jax.jit(gradient, static_argnums=2)(params, x, graphdef, target, is_token)
    with Placement(mesh).use():
        placed = Placement(mesh).shardings(logical_axes(moe), params)
        out = (None, (placed, None))
        function = jax.jit(gradient, static_argnums=2, out_shardings=out)
        arguments = (jax.device_put(params, placed), x, graphdef, target, is_token)
        return function.lower(*arguments).compile().as_text() if compiled else function(*arguments)


MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "data=2 x expert=4": {"data": 2, "expert": 4},
    "fsdp=2 x expert=2 x tensor=2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "data=2 x tensor=4": {"data": 2, "tensor": 4},
    "expert=2 x sequence=2 x tensor=2": {"expert": 2, "sequence": 2, "tensor": 2},
}
CASES = {
    "dropless": {
        "use_bias": True,
        "activation": "clamped_swiglu",
        "router": SoftmaxRouterConfig(use_bias=True),
        "jitter": 0.1,
    },
    "capacity": {
        "use_bias": True,
        "dispatch": CapacityConfig(capacity_factor=1.0, group_size=16, min_capacity=1),
        "router": SigmoidRouterConfig(num_groups=4, groups_per_token=2),
    },
    "ragged": {"dispatch": DroplessConfig(exchange="ragged_all_to_all"), "use_bias": True},
    "expert choice": {"router": ExpertChoiceRouterConfig(group_size=4)},
}
DIAGONAL = [
    ("dropless", "fsdp=8"),
    ("dropless", "data=2 x expert=4"),
    ("dropless", "fsdp=2 x expert=2 x tensor=2"),
    ("capacity", "fsdp=2 x expert=2 x tensor=2"),
    ("capacity", "expert=2 x sequence=2 x tensor=2"),
    ("ragged", "fsdp=2 x expert=2 x tensor=2"),
    ("expert choice", "data=2 x expert=4"),
]
OTHERS = [(case, mesh) for case in CASES for mesh in MESHES if (case, mesh) not in DIAGONAL]
PAIRS = DIAGONAL + [pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS]
_one_device = {}


@pytest.mark.parametrize(("case", "mesh"), PAIRS)
def test_a_mesh_gives_what_one_device_gives(case, mesh):
    moe, arrays = build(**CASES[case]), inputs()
    if case not in _one_device:
        _one_device[case] = step(moe, arrays)
        (_, (_, stats)), _ = _one_device[case]
        assert (stats.dropped > 0) == (case in ("capacity", "expert choice"))
    actual = step(moe, arrays, mesh_of(**MESHES[mesh]))

    def assert_close(ours, expected):
        size = max(np.abs(expected).max(), 1e-6)
        np.testing.assert_allclose(ours / size, expected / size, atol=1e-5)

    jax.tree.map(assert_close, actual, _one_device[case])


@pytest.mark.parametrize("case", ["dropless", "capacity"])
@pytest.mark.parametrize(("batch", "length"), [(3, 1), (5, 8)])
def test_a_batch_that_the_mesh_does_not_divide(case, batch, length):
    """A prompt, or the last tokens of a few: devices without tokens of their own still serve their experts."""
    graphdef, params = split(build(**CASES[case]))
    x, _, is_token = inputs(batch, length)
    run = jax.jit(lambda params, x: merge(graphdef, params)(x, toy.context(x, is_token=is_token)))
    expected = run(params, x)
    with jax.set_mesh(mesh_of(data=2, expert=4)):
        actual = jax.jit(lambda params, x: merge(graphdef, params)(x, toy.context(x, is_token=is_token)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


def test_groups_too_large_for_the_devices_are_reported(caplog):
    moe = build(dispatch=CapacityConfig(group_size=32))
    with jax.set_mesh(mesh_of(data=8)):
        jax.eval_shape(lambda x: moe(x, toy.context(x)), inputs()[0])
    assert "groups of 32 tokens are too few for 8 devices" in caplog.text
    assert "A group_size of 16 would" in caplog.text


@pytest.mark.parametrize("exchange", ["gather", "ragged_all_to_all"])
def test_a_short_buffer_drops_and_counts(exchange):
    """All tokens want the two experts of one device of four, which has rows for half of them."""
    moe = build(
        router=SoftmaxRouterConfig(use_bias=True), dispatch=DroplessConfig(exchange=exchange, buffer_factor=2.0)
    )
    moe.router.bias[...] = jnp.array([0.0, 0, 100, 100, 0, 0, 0, 0])
    x, _, _ = inputs()
    graphdef, params = split(moe)
    exact, _ = moe(x, toy.context(x))
    with jax.set_mesh(mesh_of(data=2, expert=4)):
        y, stats = jax.jit(lambda params, x: merge(graphdef, params)(x, toy.context(x)))(params, x)
    np.testing.assert_allclose(stats.dropped, 0.5, rtol=1e-6)
    np.testing.assert_allclose(stats.load, [0, 0, 0.5, 0.5, 0, 0, 0, 0], rtol=1e-6)
    whole = np.all(np.abs(y - exact) < 1e-4, axis=-1)
    lost = np.all(y == 0, axis=-1)
    # Ring: each device of origin's tokens by expert, so half of the assignments are all of the first expert's.
    assert whole.any() == lost.any() == (exchange == "ragged_all_to_all")


COLLECTIVES = {
    # The statistics with some gradients, and the other gradients.
    ("dropless", "data=8"): {"all-reduce": 2},
    # Four kernels are gathered; the experts' gradients are scattered, and the router's, which is small, added up.
    ("dropless", "fsdp=8"): {"all-gather": 4, "reduce-scatter": 3, "all-reduce": 2},
    # Tokens, choices, weights and the output's gradient are gathered; the output and the gradients of tokens and
    # weights are scattered.
    ("dropless", "data=2 x expert=4"): {"all-gather": 4, "reduce-scatter": 3, "all-reduce": 3},
    # There and back, and again for the gradient.
    ("capacity", "data=2 x expert=4"): {"all-to-all": 4, "all-reduce": 3},
}


@pytest.mark.parametrize(("case", "mesh"), COLLECTIVES)
def test_only_the_communication_meant(case, mesh):
    moe = build() if case == "dropless" else build(dispatch=CapacityConfig(group_size=8))
    text = step(moe, inputs(), mesh_of(**MESHES[mesh]), compiled=True)
    found = Counter(re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text))
    assert found == COLLECTIVES[case, mesh]


def test_groups_are_parts_of_a_sequence_or_whole_sequences():
    assert tokens_per_group(8, 512, 4096) == 4096
    assert tokens_per_group(6, 512, 4096) == 3072
    assert tokens_per_group(8, 512, 200) == 128
    assert tokens_per_group(7, 1, 4) == 1


def test_an_expert_axis_without_experts_to_split_is_refused():
    mesh = mesh_of(data=2, expert=4)
    check_experts(8, mesh)
    check_experts(None, mesh_of(data=8))
    with pytest.raises(UserError, match=r"MeshConfig\.expert is 4, but the model has no experts: use 1"):
        check_experts(None, mesh)
    with pytest.raises(UserError, match=r"num_experts \(6\) cannot be divided among MeshConfig.expert \(4\): 3 would"):
        check_experts(6, mesh)
