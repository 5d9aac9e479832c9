"""Models loaded from runs and from Hugging Face directories: what they write and how they score."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import t5x_like
from t5x_like.commands.main import main
from t5x_like.data.tokenizers import ByteTokenizer
from t5x_like.errors import UserError
from t5x_like.inference.model import LoadedModel
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.parameters import merge, split
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import EncoderDecoderConfig
from t5x_like.sharding.mesh import MeshConfig, place
from t5x_like.sharding.placement import ContextConfig
from tests import toy

RUN = """
include 'experiment.gin'
include 'models/decoder_tiny.gin'
include 'data/text.gin'
include 'optimizers/adamw_cosine.gin'
include 'meshes/data_parallel.gin'
STEPS = 4
BATCH_SIZE = 8
SEQUENCE_LENGTH = 64
WARMUP_STEPS = 2
VOCAB_SIZE = 320
DecoderConfig.d_model = 32
StackConfig.num_layers = 2
MLPConfig.d_ff = 32
AttentionConfig.num_heads = 4
DataConfig.split = 'position'
RunConfig.logging = @LoggingConfig()
LoggingConfig.sample_tokens = 0
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and its model exported."""
    directory = tmp_path_factory.mktemp("trained")
    toy.write_text(directory)
    (directory / "run.gin").write_text(RUN)
    flags = [f"--gin.TEXT_FILES={directory}/text.txt", f"--gin.MODEL_DIR={directory}/run"]
    assert main(["train", f"--gin_file={directory}/run.gin", *flags]) == 0
    assert main(["convert", f"--from={directory}/run", f"--to={directory}/hf"]) == 0
    return directory


@pytest.fixture(scope="module")
def model(trained):
    return t5x_like.load(trained / "run")


def test_importing_the_package_imports_no_jax():
    code = "import sys, t5x_like; assert 'jax' not in sys.modules; t5x_like.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'nothing'" in done.stderr


def test_a_model_writes_what_the_command_writes(trained, model, capsys):
    written = model.generate(["the cat", ""], max_new_tokens=7, temperature=0)
    capsys.readouterr()
    prompts = ["--prompt=the cat", "--prompt=", "--greedy", "--max_new_tokens=7"]
    assert main(["generate", f"--model_dir={trained}/run", *prompts]) == 0
    assert capsys.readouterr().out == f"the cat{written[0]}\n{'-' * 40}\n{written[1]}\n"
    assert model.step == 4
    assert t5x_like.load(trained / "run", step=4, mesh=MeshConfig(data=2, tensor=4)).generate(
        ["the cat"], max_new_tokens=7, temperature=0
    ) == written[:1]  # fmt: skip


def test_scores_are_sums_of_log_probabilities(model):
    texts = ["the cat sat on a mat", "then", ("the cat", " ran away")]
    scores = model.score(texts)
    module = merge(model.graphdef, model.params)
    for text, score in zip(texts, scores, strict=True):
        before, scored = ("", text) if isinstance(text, str) else text
        before = [model.tokenizer.bos_id, *model.tokenizer.encode(before).tolist()]
        tokens = [*before, *model.tokenizer.encode(scored).tolist()]
        logits = module.head.scores(module(toy.tokens(np.array([tokens[:-1]]))).x, module.embedding[...])
        logs = jax.nn.log_softmax(logits.astype("float32"))[0]
        places = range(len(before) - 1, len(tokens) - 1)
        expected = sum(float(logs[place, tokens[place + 1]]) for place in places)
        assert score.num_tokens == len(places)
        # In bfloat16, and padded to another length.
        np.testing.assert_allclose(score.log_likelihood, expected, rtol=5e-3)
    assert model.score(texts * 4) == scores * 4


def test_a_hugging_face_directory_is_the_same_model(trained, model, tmp_path, capsys):
    prompts = {"max_new_tokens": 5, "temperature": 0}
    assert main(["convert", f"--from={trained}/hf", f"--to={tmp_path}/imported"]) == 0
    for path in (trained / "hf", tmp_path / "imported"):
        again = t5x_like.load(path)
        # Exported is float32, where the run computes in bfloat16.
        np.testing.assert_allclose(again.score(["a mat"])[0], model.score(["a mat"])[0], rtol=1e-2)
        assert again.tokenizer.encode("the cat").tolist() == model.tokenizer.encode("the cat").tolist()
        capsys.readouterr()
        assert main(["generate", f"--model_dir={path}", "--prompt=the", "--greedy", "--max_new_tokens=5"]) == 0
        assert capsys.readouterr().out == f"the{again.generate(['the'], **prompts)[0]}\n"


def test_a_hugging_face_directory_is_evaluated_in_its_own_tokens(trained, capsys):
    def scores(*flags):
        capsys.readouterr()
        assert main(["evaluate", *flags]) == 0
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    data = ["--gin_file=evaluate.gin", "--gin_file=data/text.gin", f"--gin.TEXT_FILES={trained}/text.txt"]
    settings = ["--gin.SEQUENCE_LENGTH=64", "--gin.VOCAB_SIZE=310", "--gin.DataConfig.split=position"]
    ours, theirs = scores(f"--model_dir={trained}/run"), scores(f"--model_dir={trained}/hf", *data, *settings)
    assert theirs["num_tokens"] == ours["num_tokens"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-2)
    assert list((trained / "hf").glob("data*")) == []


def test_writing_follows_the_choices_of_the_mesh(trained):
    """Ulysses cannot divide 4 heads among 8 devices: who ignores it writes on."""
    mesh = lambda **context: MeshConfig(data=1, sequence=8, context=ContextConfig(**context))
    options = {"max_new_tokens": 32, "temperature": 0}
    assert len(t5x_like.load(trained / "run", mesh=mesh()).generate(["the"], **options)) == 1
    with pytest.raises(UserError, match="'ulysses' cannot split 4 heads"):
        t5x_like.load(trained / "run", mesh=mesh(method="ulysses")).generate(["the"], **options)


def test_an_encoder_decoder_scores_pairs():
    block = toy.model().stack.block
    crossing = dataclasses.replace(block, cross_attention=AttentionConfig(num_heads=4))
    stacks = {"encoder": StackConfig(num_layers=1, block=block), "decoder": StackConfig(num_layers=1, block=crossing)}
    config = EncoderDecoderConfig(d_model=32, vocab_size=259, dtype="float32", **stacks)
    graphdef, params = split(config.build(jax.random.key(0)))
    model = LoadedModel(config, graphdef, params, ByteTokenizer(), place(MeshConfig()), context_length=64)
    pairs = [("ab", "cd"), ("a longer one", "b")]
    scores = model.score(pairs)
    assert [score.num_tokens for score in scores] == [2, 1]
    # Over all single bytes, probabilities add up to those of the ids that are bytes.
    singles = model.score([("ab", chr(byte)) for byte in range(128)])
    total = sum(np.exp(score.log_likelihood) for score in singles)
    assert 128 / 259 * 0.5 < total < 1
    assert model.score([("ab", "c")])[0].log_likelihood > scores[0].log_likelihood
    assert len(model.generate(["ab"], max_new_tokens=3, temperature=0)) == 1
    with pytest.raises(UserError, match="scores pairs"):
        model.score(["ab"])


def test_what_cannot_be_loaded_or_scored_is_named(trained, model, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        t5x_like.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        t5x_like.load(trained / "run", step=3)
    with pytest.raises(UserError, match="no token to score"):
        model.score([""])
    with pytest.raises(UserError, match="and the model sees 64"):
        model.score(["the cat " * 99])
    for path in (trained / "hf").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"has no tokenizer that can be read: neither tokenizer.json nor"):
        t5x_like.load(tmp_path)
