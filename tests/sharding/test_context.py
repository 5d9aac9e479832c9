"""Attention, and whole models, on meshes that split the length of rows."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias
from t5x_like.learning.loss import LossConfig, batch_loss
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.parameters import split
from t5x_like.models.position_biases import RelativeBiasConfig
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import EncoderDecoderConfig
from t5x_like.sharding import context
from t5x_like.sharding.logical import on_devices
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import ContextConfig, Placement
from t5x_like.sharding.token_runs import from_zigzag, to_zigzag
from t5x_like.training.job import compile_step, set_up
from t5x_like.training.state import initial_state
from tests import toy
from tests.sharding.agreement import HEADS, arrays, check, packed

CAUSAL = MaskSpec(causal=True)
METHODS = {"all_gather": {"sequence": 4}, "ulysses": {"sequence": 2, "tensor": 2}, "ring": {"sequence": 4}}
normal = lambda *shape: np.random.default_rng(3).normal(size=shape).astype(np.float32)


def kinds_of_transfer(program: str) -> set[str]:
    return set(re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)\(", program))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("trained", "options"),
    [
        ({}, {"mask": CAUSAL, "segment_ids": (packed(32),) * 2}),
        ({"table": normal(HEADS, 8)}, {"mask": CAUSAL, "relative_bias": RelativeBias(8, 16, bidirectional=False)}),
        ({"table": normal(HEADS, 8)}, {"relative_bias": RelativeBias(8, 16)}),
        ({"sinks": normal(HEADS)}, {"mask": MaskSpec(causal=True, prefix=5), "alibi_slopes": np.abs(normal(HEADS))}),
    ],
    ids=["packed", "relative bias", "encoder", "prefix, sinks and alibi"],
)
def test_every_method_is_attention(method, trained, options):
    check({"data": 1, **METHODS[method]}, {**arrays(32), **trained}, options, method=method)


@pytest.mark.parametrize("method", ["all_gather", "ring"])
def test_tokens_may_lie_in_the_order_of_the_row(method):
    check({"data": 2, "sequence": 2, "tensor": 2}, arrays(32), {"mask": CAUSAL}, method=method, balance=False)


@pytest.mark.parametrize("method", METHODS)
def test_queries_attend_to_another_sequence(method):
    ids = (packed(16), packed(32))
    check({"data": 1, **METHODS[method]}, arrays(16, kv_length=32), {"segment_ids": ids}, method=method)


def test_positions_may_be_given():
    order = np.concatenate([np.zeros(8, np.int32), np.arange(1, 25, dtype=np.int32)])
    options = {"mask": CAUSAL, "positions": (np.broadcast_to(order, (2, 32)),) * 2}
    for method in ("all_gather", "ring"):
        check({"data": 1, "sequence": 4}, arrays(32), options, method=method, balance=False)


@pytest.mark.parametrize(
    ("mask", "balance"),
    [
        (MaskSpec(causal=True, window=(4, None)), True),
        (MaskSpec(causal=True, window=(8, None)), False),
        (MaskSpec(window=(3, 2)), True),
        (MaskSpec(causal=True, chunk=4), True),
    ],
    ids=str,
)
def test_a_window_exchanges_only_what_it_reaches(mask, balance):
    options = {"mask": mask, "segment_ids": (packed(32),) * 2} if balance else {"mask": mask}
    program = check({"data": 1, "sequence": 4}, arrays(32), options, balance=balance)
    assert balance or kinds_of_transfer(program) == {"collective-permute"}


def test_a_window_wider_than_the_neighbour_is_gathered():
    program = check({"data": 1, "sequence": 4}, arrays(32), {"mask": MaskSpec(window=(9, 0))})
    assert "all-gather" in kinds_of_transfer(program)


def test_each_method_sends_in_its_own_way():
    sent = {
        method: kinds_of_transfer(check({"data": 1, "sequence": 4}, arrays(32, kv_heads=4), {}, method=method))
        for method in METHODS
    }
    assert sent["ring"] == {"collective-permute"}
    assert sent["ulysses"] == {"all-to-all"}
    assert "all-gather" in sent["all_gather"]


def test_ulysses_needs_enough_heads():
    with pytest.raises(UserError, match="cannot split 4 heads among tensor x sequence = 8: use 'all_gather' or 'ring'"):
        check({"data": 1, "sequence": 8}, arrays(32), {}, method="ulysses")


def test_zigzag_gives_every_device_the_same_causal_work():
    places = to_zigzag(np.arange(32)[None], 4)
    np.testing.assert_array_equal(from_zigzag(places, 4)[0], np.arange(32))
    work = np.asarray(places[0]).reshape(4, 8).sum(axis=1)
    assert (work == work[0]).all()


def test_a_batch_is_put_in_order_with_its_positions():
    batch = {**toy.batch(), "encoder_input_tokens": np.zeros((toy.BATCH, 8), np.int32)}
    mesh = build_mesh(MeshConfig(data=2, sequence=4))
    with Placement(mesh).use():
        with context.balanced(batch) as ordered:
            assert context.lies_in_zigzag(CAUSAL)
            assert not context.lies_in_zigzag(MaskSpec())
        with Placement(mesh, ContextConfig(balance=False)).use(), context.balanced(batch) as left:
            assert left is batch
        assert not context.lies_in_zigzag(CAUSAL)
    positions = np.asarray(ordered["decoder_positions"])
    assert positions[0].tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    taken = np.take_along_axis(batch["decoder_target_tokens"], positions, axis=1)
    np.testing.assert_array_equal(ordered["decoder_target_tokens"], taken)
    assert ordered["encoder_input_tokens"] is batch["encoder_input_tokens"]


def trace(directory, config: MeshConfig, num_devices: int, dropout_rate: float = 0.0):
    """Losses of three steps, and Adam's first moments after them."""
    decoder = toy.model(dropout_rate=dropout_rate)
    mesh = build_mesh(config, jax.devices()[:num_devices])
    job = set_up(toy.experiment(directory, mesh=config, decoder=decoder), mesh, toy.VOCAB)
    losses = []
    with jax.set_mesh(mesh):
        state, step = initial_state(job.create_state, job.state), compile_step(job)
        for seed in range(3):
            state, metrics = step(state, on_devices(toy.batch(seed), job.batch))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.opt_state[1].mu)


@pytest.mark.parametrize(
    ("sizes", "method", "dropout_rate"),
    [
        ({"data": 2, "sequence": 2, "tensor": 2}, "all_gather", 0.0),
        ({"data": 1, "fsdp": 2, "sequence": 4}, "ring", 0.0),
        pytest.param({"data": 1, "sequence": 8}, "all_gather", 0.0, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "sequence": 2}, "ulysses", 0.0, marks=pytest.mark.slow),
        pytest.param({"data": 2, "sequence": 4}, "all_gather", 0.1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_is_that_of_one_device(sizes, method, dropout_rate, tmp_path):
    expected, expected_moments = trace(tmp_path, MeshConfig(), 1, dropout_rate)
    losses, moments = trace(tmp_path, MeshConfig(**sizes, context=ContextConfig(method=method)), 8, dropout_rate)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for ours, one in zip(jax.tree.leaves(moments), jax.tree.leaves(expected_moments), strict=True):
        np.testing.assert_allclose(ours, one, atol=2e-5 * max(1e-2, np.abs(one).max()))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "share"), [("ulysses", 0.2), ("ring", 0.3)])
def test_memory_falls_with_the_devices_that_share_the_length(method, share, tmp_path):
    """Of a program for long rows, which is compiled and not run."""

    def temporaries(count: int) -> int:
        config = MeshConfig(data=1, sequence=count, context=ContextConfig(method=method))
        decoder = toy.model(num_heads=8)
        decoder = dataclasses.replace(decoder, stack=dataclasses.replace(decoder.stack, remat="full"))
        experiment = toy.experiment(tmp_path, mesh=config, decoder=decoder)
        data = dataclasses.replace(experiment.data, sequence_length=32_768, batch_size=1)
        mesh = build_mesh(config, jax.devices()[:count])
        job = set_up(dataclasses.replace(experiment, data=data), mesh, toy.VOCAB)
        return compile_step(job).memory_analysis().temp_size_in_bytes

    assert temporaries(8) < share * temporaries(1)


@pytest.mark.parametrize("method", ["all_gather", pytest.param("ring", marks=pytest.mark.slow)])
def test_an_encoder_decoder_is_that_of_one_device(method):
    """With T5's biases, packed rows of two lengths, and attention across, whose queries and keys are both split."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2)
    stack = StackConfig(
        num_layers=2,
        block=BlockConfig(mixer=attention, feedforward=MLPConfig(d_ff=32)),
        position_bias=RelativeBiasConfig(num_buckets=8, max_distance=16),
    )
    crossing = dataclasses.replace(stack, block=dataclasses.replace(stack.block, cross_attention=attention))
    config = EncoderDecoderConfig(d_model=16, vocab_size=toy.VOCAB, dtype="float32", encoder=stack, decoder=crossing)
    graphdef, params = split(config.build(jax.random.key(0)))
    batch = toy.batch() | {
        "encoder_input_tokens": toy.batch(1)["decoder_input_tokens"][:, :8],
        "encoder_segment_ids": packed(8, toy.BATCH),
        "decoder_segment_ids": packed(toy.LENGTH, toy.BATCH),
    }
    loss = lambda params, batch: batch_loss(LossConfig(), graphdef, params, batch)[0]
    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = build_mesh(MeshConfig(data=2, sequence=2, tensor=2))
    with Placement(mesh, ContextConfig(method=method)).use():
        ours = jax.jit(jax.value_and_grad(loss))(params, batch)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1e-2, np.abs(other).max()))
