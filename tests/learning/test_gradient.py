"""Gradients by the schedule that needs the loss inside, against differentiation of the whole loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.learning.gradient import loss_gradient
from t5x_like.learning.loss import LossConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.model_spec import model_spec
from t5x_like.models.parameters import split
from t5x_like.models.position_biases import RelativeBiasConfig
from t5x_like.models.stack import PipelineConfig, StackConfig
from t5x_like.models.transformer import EncoderConfig, EncoderDecoderConfig
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from tests import toy

MESH = MeshConfig(data=1, stage=4)


def piped(model, schedule, num_microbatches=8):
    pipeline = PipelineConfig(num_microbatches=num_microbatches, schedule=schedule)
    stacks = {name: dataclasses.replace(stack, pipeline=pipeline) for name, stack in model.stacks.items()}
    return dataclasses.replace(model, **stacks)


def with_stack(model, **fields):
    return dataclasses.replace(model, vocab_size=toy.VOCAB, stack=dataclasses.replace(model.stack, **fields))


def compiled(model, batch, mesh_config, devices):
    """The program from parameters to gradient and results, and parameters."""
    mesh, spec = build_mesh(mesh_config, devices), model_spec(model)
    places = mesh_config.on(mesh).shardings(spec.axes, spec.params)
    gradient = lambda params: loss_gradient(LossConfig(), spec.graphdef, params, batch, jax.random.key(1))
    with mesh_config.on(mesh).use():
        params = jax.jit(lambda: split(model.build(jax.random.key(0)))[1], out_shardings=places)()
        return jax.jit(gradient, out_shardings=(places, None)).lower(params).compile(), params


def plain_block():
    return toy.model().stack.block


def moe_block():
    return dataclasses.replace(plain_block(), feedforward=MoEConfig(num_experts=4, experts_per_token=2, d_ff=32))


def encoder_decoder(encoder_block, decoder_block, **fields):
    """T5 with a layer of the decoder before the cycles, which attends to the encoder's output as all others do."""
    block = dataclasses.replace(decoder_block, cross_attention=AttentionConfig(num_heads=4))
    bias = RelativeBiasConfig(num_buckets=8)
    stack = StackConfig(num_layers=4, block=encoder_block, position_bias=bias)
    return EncoderDecoderConfig(
        d_model=32,
        dtype="float32",
        vocab_size=toy.VOCAB,
        encoder=stack,
        decoder=StackConfig(num_layers=5, first=(block,), block=block, position_bias=bias),
        **fields,
    )


def t5_block(feedforward):
    return BlockConfig(mixer=AttentionConfig(num_heads=4), feedforward=feedforward)


def with_inputs(batch):
    """The batch of an encoder-decoder: inputs beside the targets, some of them padding."""
    inputs = batch["decoder_input_tokens"][:, ::-1]
    lengths = np.arange(len(inputs))[:, None] % 4 + 3
    return batch | {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": (np.arange(inputs.shape[1]) < lengths).astype(np.int32),
    }


MODELS = {
    # A layer before the cycles, three cycles of two layers in four stages, and a layer behind: all kinds of places.
    "places": lambda: with_stack(
        toy.model(dropout_rate=0.1),
        num_layers=8,
        first=(plain_block(),),
        block=(plain_block(), BlockConfig(mixer=plain_block().mixer, feedforward=MLPConfig(d_ff=16))),
        remat="full",
    ),
    "encoder": lambda: with_stack(EncoderConfig(d_model=32, dtype="float32", stack=toy.model().stack), num_layers=4),
    "encoder_decoder": lambda: encoder_decoder(*2 * [t5_block(MLPConfig(d_ff=32))], dropout_rate=0.1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_one_device(name):
    model, batch = MODELS[name](), toy.batch(0)
    if name == "encoder":
        batch = {key.replace("decoder", "encoder"): value for key, value in batch.items()}
    if name == "encoder_decoder":
        batch = with_inputs(batch)
    program, params = compiled(model, batch, MeshConfig(), jax.devices()[:1])
    expected, expected_results = program(params)
    program, params = compiled(piped(model, "1f1b"), batch, MESH, jax.devices()[:4])
    ours, results = program(params)
    np.testing.assert_allclose(results.metrics()["loss"], expected_results.metrics()["loss"], rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        bound = 1e-5 * max(np.abs(other).max(), 0.1 * scale)
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= bound, jax.tree_util.keystr(path)


WITH_EXPERTS = {
    "decoder": lambda: with_stack(toy.model(), num_layers=4, block=moe_block()),
    # Experts in scanned layers only: those of other layers see a microbatch at a time by 1F1B.
    "encoder_decoder": lambda: encoder_decoder(t5_block(moe_block().feedforward), t5_block(MLPConfig(d_ff=32))),
}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_routers_are_trained_as_by_gpipe(name):
    model, batch = WITH_EXPERTS[name](), with_inputs(toy.batch(0))
    (expected, expected_results), (ours, results) = (
        program(params)
        for program, params in (compiled(piped(model, s), batch, MESH, jax.devices()[:4]) for s in ("gpipe", "1f1b"))
    )
    for one, other in zip(jax.tree.leaves((ours, results)), jax.tree.leaves((expected, expected_results)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 0.1), rtol=0)


def temporaries(schedule, count):
    """Bytes on one of four devices, each with one layer, for so many microbatches of 8 rows of 64 tokens."""
    model = with_stack(toy.model(), num_layers=4, remat="full")
    batch = {key: jnp.zeros((8 * count, 64), value.dtype) for key, value in toy.batch(0).items()}
    program, _ = compiled(piped(model, schedule, count), batch, MESH, jax.devices()[:4])
    return program.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_microbatches():
    vectors = 8 * 64 * 32 * 4  # of a microbatch
    as_many_as_stages, gpipe = temporaries("gpipe", 4), temporaries("gpipe", 16)
    one, other = temporaries("1f1b", 16), temporaries("1f1b", 32)
    # Sixteen microbatches more: of them there are only tokens.
    assert other - one < 2 * vectors
    assert gpipe - one > 16 * vectors
    assert other < as_many_as_stages
