"""The shipped encoders and encoder-decoders have the sizes that were published."""

import jax
import pytest

from t5x_like.config import parse_config
from t5x_like.huggingface.directory import choose_family
from t5x_like.models.model_spec import model_spec
from t5x_like.training.experiment import Experiment

SPANS, PAIRS = ("python_library_spans", ()), ("python_library_masked", ())
MASKED = ("python_library_masked", ("MaskedLM.pairs='none'",))

PUBLISHED = {
    "t5_small": (SPANS, "t5", 60_506_624),
    "t5_base": (SPANS, "t5", 222_903_552),
    "t5_large": (SPANS, "t5", 737_668_096),
    "t5_1_1_small": (SPANS, "t5", 76_961_152),
    "t5_1_1_base": (SPANS, "t5", 247_577_856),
    "t5_1_1_large": (SPANS, "t5", 783_150_080),
    "t5_1_1_xl": (SPANS, "t5", 2_849_757_184),
    "t5_1_1_xxl": (SPANS, "t5", 11_135_332_352),
    "bert_base": (PAIRS, "bert", 110_106_428),
    "bert_large": (PAIRS, "bert", 336_226_108),
    "roberta_base": (MASKED, "roberta", 124_697_433),
    "modernbert_base": (MASKED, "modernbert", 149_655_232),
    "modernbert_large": (MASKED, "modernbert", 395_881_664),
}
"""Data that fits, family, and number of parameters of the model for pre-training, as the model cards give it."""


def shipped(name):
    data, overrides = PUBLISHED[name][0]
    files = ("experiment.gin", f"data/{data}.gin", "optimizers/adamw_cosine.gin", "meshes/fsdp.gin")
    macros = ["MODEL_DIR='x'", "STEPS=10_000", "BATCH_SIZE=8", "SEQUENCE_LENGTH=128"]
    return parse_config([f"models/{name}.gin", *files], [*macros, *overrides]).build(Experiment).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name):
    _, family, count = PUBLISHED[name]
    config = shipped(name)
    assert sum(array.size for array in jax.tree.leaves(model_spec(config).params)) == count
    assert choose_family(config, 8192)[0].model_type == family


@pytest.mark.hf
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_the_same(name):
    torch = pytest.importorskip("torch", reason="needs the extra: hf")
    transformers = pytest.importorskip("transformers", reason="needs the extra: hf")
    fields = choose_family(shipped(name), 8192)[1]
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        theirs = getattr(transformers, fields["architectures"][0])(config)
    count = theirs.num_parameters()
    if name.startswith("t5_1_1"):  # transformers 5 ties the head of all T5s until it reads a file that does not.
        count += config.vocab_size * config.d_model
    assert count == PUBLISHED[name][2]
