"""The shipped models have the sizes that were published."""

import dataclasses
import re

import jax
import pytest

from t5x_like.checkpoints.huggingface import choose_family
from t5x_like.config import parse_config
from t5x_like.config.parse import SHIPPED
from t5x_like.models.transformer import DecoderConfig
from t5x_like.training.experiment import Experiment
from t5x_like.training.state import model_spec
from tests.config.test_shipped_encoders import PUBLISHED as ENCODERS

PUBLISHED = {
    "gpt2": ("gpt2", 124_439_808),
    "llama2_7b": ("llama", 6_738_415_616),
    "llama3_8b": ("llama", 8_030_261_248),
    "llama3_70b": ("llama", 70_553_706_496),
    "mistral_7b": ("mistral", 7_241_732_096),
    "qwen2_7b": ("qwen2", 7_615_616_512),
    "qwen3_8b": ("qwen3", 8_190_735_360),
}
"""Family and number of parameters, as the model cards on huggingface.co give it."""


def shipped(name: str) -> DecoderConfig:
    others = ("experiment.gin", "data/python_library.gin", "optimizers/adamw_cosine.gin", "meshes/fsdp.gin")
    macros = {"MODEL_DIR": "x", "STEPS": 10_000, "BATCH_SIZE": 8, "SEQUENCE_LENGTH": 128}
    overrides = [f"{name}={value}" for name, value in macros.items()]
    return parse_config([f"models/{name}.gin", *others], overrides).build(Experiment).model


def test_every_model_is_part_of_a_run_or_of_a_list():
    files = [path for folder in ("runs", "models") for path in SHIPPED.glob(f"{folder}/*.gin")]
    included = {name for path in files for name in re.findall("include 'models/(.*).gin'", path.read_text())}
    assert {path.stem for path in SHIPPED.glob("models/*.gin")} == included | set(PUBLISHED) | set(ENCODERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name):
    family, count = PUBLISHED[name]
    config = shipped(name)
    assert sum(array.size for array in jax.tree.leaves(model_spec(config).params)) == count
    assert choose_family(config, 4096)[0].model_type == family


@pytest.mark.hf
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_the_same(name):
    torch = pytest.importorskip("torch", reason="needs the extra: hf")
    transformers = pytest.importorskip("transformers", reason="needs the extra: hf")
    # One layer, and another to see what a layer has.
    counts = []
    for num_layers in (1, 2):
        config = shipped(name)
        config = dataclasses.replace(config, stack=dataclasses.replace(config.stack, num_layers=num_layers))
        fields = choose_family(config, 4096)[1]
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
            )
        counts.append(theirs.num_parameters())
    layers = shipped(name).stack.num_layers
    assert counts[0] + (layers - 1) * (counts[1] - counts[0]) == PUBLISHED[name][1]
