"""The shipped models have the sizes that were published."""

import dataclasses
import json
import re

import jax
import pytest

from t5x_like.config import parse_config
from t5x_like.config.parse import SHIPPED
from t5x_like.configurable import from_dict, to_dict
from t5x_like.huggingface.directory import choose_family
from t5x_like.models.model_spec import model_spec
from t5x_like.models.transformer import DecoderConfig
from t5x_like.training.experiment import Experiment
from t5x_like.training.flops import active_parameters
from tests.config.test_shipped_encoders import PUBLISHED as ENCODERS

PUBLISHED = {
    "gpt2": ("gpt2", 124_439_808),
    "gpt2_medium": ("gpt2", 354_823_168),
    "gpt2_large": ("gpt2", 774_030_080),
    "gpt2_xl": ("gpt2", 1_557_611_200),
    "llama2_7b": ("llama", 6_738_415_616),
    "llama2_13b": ("llama", 13_015_864_320),
    "llama2_70b": ("llama", 68_976_648_192),
    "llama3_8b": ("llama", 8_030_261_248),
    "llama3_70b": ("llama", 70_553_706_496),
    "llama3_1_8b": ("llama", 8_030_261_248),
    "llama3_1_70b": ("llama", 70_553_706_496),
    "llama3_1_405b": ("llama", 405_853_388_800),
    "llama3_2_1b": ("llama", 1_235_814_400),
    "llama3_2_3b": ("llama", 3_212_749_824),
    "mistral_7b": ("mistral", 7_241_732_096),
    "mixtral_8x7b": ("mixtral", 46_702_792_704),
    "mixtral_8x22b": ("mixtral", 140_620_634_112),
    "gemma_2b": ("gemma", 2_506_172_416),
    "gemma_7b": ("gemma", 8_537_680_896),
    "gemma2_2b": ("gemma2", 2_614_341_888),
    "gemma2_9b": ("gemma2", 9_241_705_984),
    "gemma2_27b": ("gemma2", 27_227_128_320),
    "gemma3_1b": ("gemma3_text", 999_885_952),
    # Less the vision tower's 416,866,032 parameters, and 1,152 * (d_model + 1) of its projection.
    "gemma3_4b": ("gemma3_text", 4_300_079_472 - 416_866_032 - 1152 * 2561),
    "gemma3_12b": ("gemma3_text", 12_187_325_040 - 416_866_032 - 1152 * 3841),
    "gemma3_27b": ("gemma3_text", 27_432_406_640 - 416_866_032 - 1152 * 5377),
    "qwen2_0_5b": ("qwen2", 494_032_768),
    "qwen2_1_5b": ("qwen2", 1_543_714_304),
    "qwen2_7b": ("qwen2", 7_615_616_512),
    "qwen2_72b": ("qwen2", 72_706_203_648),
    # The files of the smallest two hold the tied embedding twice.
    "qwen3_0_6b": ("qwen3", 751_632_384 - 151_936 * 1024),
    "qwen3_1_7b": ("qwen3", 2_031_739_904 - 151_936 * 2048),
    "qwen3_4b": ("qwen3", 4_022_468_096),
    "qwen3_8b": ("qwen3", 8_190_735_360),
    "qwen3_14b": ("qwen3", 14_768_307_200),
    "qwen3_32b": ("qwen3", 32_762_123_264),
    "qwen3_30b_a3b": ("qwen3_moe", 30_532_122_624),
    "qwen3_235b_a22b": ("qwen3_moe", 235_093_634_560),
    "olmo2_7b": ("olmo2", 7_298_617_344),
    "olmo2_13b": ("olmo2", 13_716_198_400),
    "olmo2_32b": ("olmo2", 32_234_279_936),
    "phi3_mini": ("phi3", 3_821_079_552),
    "phi3_medium": ("phi3", 13_960_238_080),
    "gpt_oss_20b": ("gpt_oss", 20_914_757_184),
    "gpt_oss_120b": ("gpt_oss", 116_829_156_672),
    "deepseek_v2_lite": ("deepseek_v2", 15_706_484_224),
    "deepseek_v2": ("deepseek_v2", 235_741_434_880),
    "deepseek_v3": ("deepseek_v3", 671_026_419_200),
}
"""Family and number of parameters, as the model cards on huggingface.co give it."""


ACTIVE = {
    "mixtral_8x7b": 12.9e9,
    "mixtral_8x22b": 39e9,
    "qwen3_30b_a3b": 3.3e9,
    "qwen3_235b_a22b": 22e9,
    "deepseek_v2": 21e9,
    "deepseek_v3": 37e9,
}
"""Parameters that a token uses, as the model cards give them, in two or three digits."""


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
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert sum(array.size for array in jax.tree.leaves(model_spec(config).params)) == count
    chosen = choose_family(config, 4096)[0].model_type
    # Phi-3 mini differs from Mistral in its tensors alone.
    assert chosen == family or (family, chosen) == ("phi3", "mistral")


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_uses_as_many_parameters_as_was_published(name):
    config = shipped(name)
    assert active_parameters(config, model_spec(config).params) == pytest.approx(ACTIVE[name], rel=0.025)


@pytest.mark.hf
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_the_same(name):
    torch = pytest.importorskip("torch", reason="needs the extra: hf")
    transformers = pytest.importorskip("transformers", reason="needs the extra: hf")
    # The layers before the cycle and one cycle, and another to see what a layer has.
    counts = []
    model = shipped(name)
    cycle, begin = len(model.stack.cycle), len(model.stack.first)
    for num_layers in (begin + cycle, begin + 2 * cycle):
        config = dataclasses.replace(model, stack=dataclasses.replace(model.stack, num_layers=num_layers))
        fields = choose_family(config, 4096)[1]
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
            )
        biases = [b for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias")]
        counts.append(theirs.num_parameters() + sum(bias.numel() for bias in biases))
    layers = model.stack.num_layers - begin - cycle
    assert counts[0] + layers * (counts[1] - counts[0]) // cycle == PUBLISHED[name][1]
