"""Runs that use the kernels, interpreted, take the losses of runs in plain JAX, step by step."""

from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest

from t5x_like.config import parse_config
from t5x_like.data.build import build_data
from t5x_like.kernels.attention.attention import BACKENDS as attention_backends
from t5x_like.kernels.grouped_matmul.grouped_matmul import BACKENDS as grouped_backends
from t5x_like.models.feedforward.moe import DroplessConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.sharding.logical import on_devices
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import compile_step, set_up
from t5x_like.training.state import initial_state
from tests import toy
from tests.kernels.platforms import interpreted

RUN = """
include 'experiment.gin'
include 'models/{model}.gin'
include 'data/text.gin'
include 'optimizers/adamw_cosine.gin'
include 'meshes/data_parallel.gin'
MODEL_DIR = '{directory}'
TEXT_FILES = '{directory}/text.txt'
STEPS = 3
BATCH_SIZE = 2
SEQUENCE_LENGTH = 32
LEARNING_RATE = 1e-2
WARMUP_STEPS = 1
DataConfig.tokenizer = @ByteTokenizerConfig()
DataConfig.split = 'position'
StackConfig.num_layers = 1
AttentionConfig.num_heads = 2
AttentionConfig.num_kv_heads = 1
AttentionConfig.backend = '{attention}'
"""
MODELS = {
    "t5_tiny": """
EncoderDecoderConfig.d_model = 32
MLPConfig.d_ff = 32
DataConfig.objective = @SpanCorruption()
ByteTokenizerConfig.special_tokens = @SpecialTokens()
SpecialTokens.num_sentinels = 10
""",
    "decoder_tiny": """
DecoderConfig.d_model = 32
MLPConfig.d_ff = 32
""",
    "moe_tiny": """
DecoderConfig.d_model = 32
MoEConfig.d_ff = 32
MoEConfig.num_experts = 4
MoEConfig.dispatch = @DroplessConfig()
DroplessConfig.backend = '{grouped_matmul}'
""",
}


def losses(directory, model: str, attention: str, grouped_matmul: str) -> list[float]:
    """Of three steps. Not by the loop, which forbids the transfers that the interpreter of TPU kernels makes."""
    names = {"model": model, "directory": directory, "attention": attention, "grouped_matmul": grouped_matmul}
    file = directory / f"{attention}.gin"
    file.write_text((RUN + MODELS[model]).format(**names))
    experiment = parse_config([str(file)]).build(Experiment)
    data = build_data(experiment.data, directory / "data")
    job = set_up(experiment, build_mesh(experiment.mesh, jax.devices()[:1]), data.tokenizer.vocab_size)
    with jax.set_mesh(job.mesh):
        state, step, found = initial_state(job.create_state, job.state), compile_step(job), []
        for number in range(experiment.run.steps):
            batch = data.train.batch(number, slice(0, experiment.data.batch_size))
            state, metrics = step(state, on_devices(batch, job.batch))
            found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_kernels_take_the_losses_of_plain_jax(model, tmp_path):
    toy.write_text(tmp_path)
    expected = losses(tmp_path, model, "reference", "reference")
    assert expected[-1] < expected[0] - 0.05
    for platform, backend in (("tpu", "tpu"), ("gpu", "triton")):
        with interpreted(platform):
            ours = losses(tmp_path, model, backend, backend)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_configuration_can_name_every_backend():
    named = {AttentionConfig: attention_backends, DroplessConfig: grouped_backends}
    for config, backends in named.items():
        assert set(get_args(get_type_hints(config)["backend"])) == {"auto", *backends}
