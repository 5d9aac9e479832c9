import dataclasses
from types import SimpleNamespace

import jax
import pytest

from t5x_like.errors import UserError
from t5x_like.models.heads.reward import RewardHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.stack import PipelineConfig
from t5x_like.models.transformer import EncoderDecoderConfig
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.job import set_up
from t5x_like.training.pipeline_checks import check_stages
from tests import toy

MESH = MeshConfig(data=2, stage=2)
TWO_STAGES = {"data": 1, "fsdp": 1, "stage": 2, "expert": 1, "sequence": 1, "tensor": 1}


def decoder(model=None, **pipeline):
    model = model or toy.model()
    return dataclasses.replace(model, stack=dataclasses.replace(model.stack, pipeline=PipelineConfig(**pipeline)))


def encoder_decoder(*schedules):
    """An encoder and a decoder with these schedules."""
    encoder, stack = (decoder(num_microbatches=4, schedule=schedule).stack for schedule in schedules)
    block = dataclasses.replace(stack.block, cross_attention=AttentionConfig(num_heads=4))
    return EncoderDecoderConfig(d_model=32, encoder=encoder, decoder=dataclasses.replace(stack, block=block))


def job(tmp_path, config, **run):
    experiment = toy.experiment(tmp_path, mesh=MESH, decoder=config, **run)
    return set_up(experiment, build_mesh(MESH, jax.devices()[:4]), toy.VOCAB)


@pytest.mark.parametrize(
    ("pipeline", "run", "messages"),
    [
        # 4 microbatches through 2 stages: 5 ticks, forth and back.
        ({"num_microbatches": 4}, {}, 10),
        ({"num_microbatches": 4, "schedule": "1f1b"}, {}, 12),
        ({"num_microbatches": 2}, {"gradient_accumulation": 2}, 12),
    ],
)
def test_a_run_says_how_long_its_stages_wait_and_what_they_send(pipeline, run, messages, tmp_path):
    made = job(tmp_path, decoder(**pipeline), **run)
    # A message is one row of 16 tokens of 32 numbers of 4 bytes per device.
    count = pipeline["num_microbatches"]
    schedule = pipeline.get("schedule", "gpipe")
    waits = f"{1 / (count + 1):.0%}"
    expected = f"stack: 2 stages, {schedule}, {count} microbatches; each waits {waits} of the time and sends "
    [line] = [line for line in made.describe().splitlines() if line.startswith("stack: ")]
    assert line == f"{expected}{messages * 2048 / 2**20:,.1f} MiB per step"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (decoder(num_microbatches=3), r"8 rows cannot be divided into PipelineConfig.num_microbatches \(3\)"),
        (decoder(repeats=2, num_microbatches=4), "cannot be cut into 4 pieces: it scans 2 cycles"),
    ],
)
def test_what_stages_cannot_run_is_refused(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        job(tmp_path, config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (decoder(toy.model(head=RewardHeadConfig()), num_microbatches=4, schedule="1f1b"), "part the pairs of rows"),
        (encoder_decoder("1f1b", "gpipe"), "1f1b for the encoder and gpipe for the decoder"),
    ],
)
def test_what_1f1b_cannot_run_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        check_stages(run_of(model), TWO_STAGES)


@pytest.mark.parametrize("encoder", ["gpipe", "1f1b"])
def test_1f1b_takes_an_encoder_decoder(encoder):
    check_stages(run_of(encoder_decoder(encoder, "1f1b")), TWO_STAGES)


def run_of(model):
    return SimpleNamespace(
        model=model, data=SimpleNamespace(batch_size=8), run=SimpleNamespace(gradient_accumulation=1)
    )


def test_repeats_belong_to_gpipe():
    with pytest.raises(UserError, match="only gpipe has repeats"):
        PipelineConfig(repeats=2, schedule="1f1b")
