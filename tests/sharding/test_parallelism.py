"""Every kind of model on every kind of mesh computes what it computes on one device."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.learning.loss import LossConfig, batch_loss
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.model_spec import model_spec
from t5x_like.models.parameters import split
from t5x_like.models.position_biases import RelativeBiasConfig
from t5x_like.models.positions import RotaryConfig
from t5x_like.models.stack import PipelineConfig, StackConfig
from t5x_like.models.transformer import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from t5x_like.sharding.mesh import MESH_AXES, MeshConfig, build_mesh

BATCH, LENGTH, VOCAB, STEPS = 16, 8, 32, 5

ROTARY = AttentionConfig(num_heads=4, num_kv_heads=2, rotary=RotaryConfig())
PLAIN = AttentionConfig(num_heads=4)
BLOCK = BlockConfig(mixer=ROTARY, feedforward=MLPConfig(d_ff=32))
T5 = BlockConfig(mixer=PLAIN, feedforward=MLPConfig(d_ff=32))
BASE = {"d_model": 16, "vocab_size": VOCAB, "dtype": "float32"}


def stack(block, num_layers=4, **fields):
    return StackConfig(num_layers=num_layers, block=block, pipeline=PipelineConfig(num_microbatches=4), **fields)


MODELS = {
    "decoder": DecoderConfig(stack=stack(BLOCK), **BASE),
    "encoder": EncoderConfig(stack=stack(BLOCK), **BASE),
    "encoder_decoder": EncoderDecoderConfig(
        encoder=stack(T5, position_bias=RelativeBiasConfig(num_buckets=8)),
        decoder=stack(dataclasses.replace(T5, cross_attention=PLAIN), position_bias=RelativeBiasConfig(num_buckets=8)),
        **BASE,
    ),
    "moe": DecoderConfig(
        stack=stack(dataclasses.replace(BLOCK, feedforward=MoEConfig(num_experts=4, experts_per_token=2, d_ff=16))),
        **BASE,
    ),
}


def batch(name):
    rng = np.random.default_rng(0)
    tokens = lambda: rng.integers(1, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    side = "encoder" if name == "encoder" else "decoder"
    arrays = {
        f"{side}_input_tokens": tokens(),
        f"{side}_target_tokens": tokens(),
        # Rows of unequal weight: a mean of means would be another number.
        f"{side}_loss_weights": (rng.random((BATCH, LENGTH)) < np.linspace(0.2, 1, BATCH)[:, None]).astype(np.float32),
    }
    segments = np.where(np.arange(LENGTH) < rng.integers(3, LENGTH, (BATCH, 1)), 1, 2).astype(np.int32)
    if name == "encoder_decoder":
        arrays |= {"encoder_input_tokens": tokens(), "encoder_segment_ids": np.ones((BATCH, LENGTH), np.int32)}
    else:
        arrays |= {f"{side}_segment_ids": segments}
    return arrays


def trace(name, mesh_config, devices):
    """Losses and gradients of a few steps of plain gradient descent."""
    config, mesh = MODELS[name], build_mesh(mesh_config, devices)
    spec = model_spec(config)
    places = mesh_config.on(mesh).shardings(spec.axes, spec.params)
    create = jax.jit(lambda key: split(config.build(key))[1], out_shardings=places)
    place = lambda a: mesh_config.on(mesh).sharding(("batch", "length")[: a.ndim], a.shape)
    arrays = {key: jax.device_put(value, place(value)) for key, value in batch(name).items()}

    def step(params):
        loss = lambda params: batch_loss(LossConfig(), spec.graphdef, params, arrays)[0]
        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    with mesh_config.on(mesh).use():
        params = create(jax.random.key(0))
        step, losses = jax.jit(step, out_shardings=(None, places, places)), []
        for _ in range(STEPS):
            value, gradient, params = step(params)
            losses.append(float(value))
    return losses, jax.tree.map(np.asarray, gradient)


@pytest.fixture(scope="module")
def one_device():
    known = {}

    def of(name):
        if name not in known:
            known[name] = trace(name, MeshConfig(), jax.devices()[:1])
        return known[name]

    return of


def sizes_of(axes):
    """A mesh of eight devices over these axes."""
    sizes = {1: (8,), 2: (2, 4), 3: (2, 2, 2)}[len(axes)]
    limits = {"tensor": 4, "expert": 4, "stage": 4}
    sizes = [min(size, limits.get(axis, 8)) for axis, size in zip(axes, sizes, strict=True)]
    return {"data": 1, **dict(zip(axes, sizes, strict=True))}


def cells(name, counts):
    axes = [axis for axis in MESH_AXES if axis != "expert" or name == "moe"]
    return [sizes_of(chosen) for count in counts for chosen in itertools.combinations(axes, count)]


FAST = {
    "decoder": [{"data": 1, "stage": 4}, {"data": 2, "stage": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "sequence": 4}],
    "encoder": [{"data": 1, "fsdp": 2, "stage": 2, "sequence": 2}],
    "encoder_decoder": [{"data": 2, "stage": 2, "tensor": 2}, {"data": 2, "sequence": 4}],
    "moe": [
        {"data": 1, "expert": 4, "fsdp": 2},
        {"data": 1, "stage": 2, "expert": 2, "fsdp": 2},
        {"data": 1, "fsdp": 2, "stage": 2, "tensor": 2},
    ],
}
ALL = {name: [*cells(name, (1, 2)), *cells(name, (3,))] for name in MODELS}


def title(sizes):
    return "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


def check(name, sizes, one_device, record=lambda name, value: None):
    count = int(np.prod(list(sizes.values())))
    losses, gradient = trace(name, MeshConfig(**sizes), jax.devices()[:count])
    expected_losses, expected = one_device(name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    errors = {
        # Relative to the gradient of the parameter; those that are all rounding are measured by the largest.
        jax.tree_util.keystr(path): np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 0.1 * scale, 1e-4)
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True)
    }
    worst = max(errors, key=errors.get)
    record("error", f"{errors[worst]:.0e}")
    assert errors[worst] <= 1e-5, worst


@pytest.mark.parametrize(("name", "sizes"), [(n, s) for n, all_sizes in FAST.items() for s in all_sizes], ids=str)
def test_a_diagonal_of_the_matrix(name, sizes, one_device):
    check(name, sizes, one_device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"), [pytest.param(n, s, id=f"{n}-{title(s)}") for n, all_sizes in ALL.items() for s in all_sizes]
)
def test_the_whole_matrix(name, sizes, one_device, record_property):
    check(name, sizes, one_device, record_property)


def test_uneven_layers_and_turns_of_a_pipeline(one_device):
    """Five layers in two stages of two turns: three more would fill them, and are skipped."""
    expected_config = DecoderConfig(stack=stack(BLOCK, num_layers=5), **BASE)
    turns = dataclasses.replace(expected_config.stack, pipeline=PipelineConfig(num_microbatches=4, repeats=2))
    MODELS["five"], MODELS["turns"] = expected_config, dataclasses.replace(expected_config, stack=turns)
    expected, _ = trace("five", MeshConfig(), jax.devices()[:1])
    for name in ("five", "turns"):
        losses, _ = trace(name, MeshConfig(data=1, stage=2), jax.devices()[:2])
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_stages_hold_their_layers_and_nothing_is_computed_in_bubbles():
    """The layers of a stage run inside a conditional, and only microbatches travel, forth and back."""
    mesh_config = MeshConfig(data=1, stage=4)
    mesh = build_mesh(mesh_config, jax.devices()[:4])
    spec = model_spec(MODELS["decoder"])
    places = mesh_config.on(mesh).shardings(spec.axes, spec.params)
    layers = places["stack"]["scanned"]["0"]["mixer"]["query"]["kernel"]
    assert layers.spec[0] == "stage"
    arrays = jax.tree.map(jnp.asarray, batch("decoder"))
    loss = lambda params: batch_loss(LossConfig(), spec.graphdef, params, arrays)[0]
    with mesh_config.on(mesh).use():
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), spec.params, places)
        text = jax.jit(jax.grad(loss), out_shardings=places).lower(target).compile().as_text()
    assert text.count("conditional(") >= 2
    assert text.count(" collective-permute(") <= 6
