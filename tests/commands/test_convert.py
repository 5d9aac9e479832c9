"""`convert` as users run it, both ways."""

import json
import shutil

import jax
import numpy as np
import pytest

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands.main import main
from t5x_like.config import parse_config
from t5x_like.huggingface.convert import load_saved, restore_params
from t5x_like.huggingface.directory import read_config
from t5x_like.huggingface.safetensors import INDEX, open_tensors
from t5x_like.models.model_spec import model_spec
from t5x_like.models.parameters import merge
from t5x_like.sharding.mesh import MeshConfig, place
from t5x_like.training.experiment import Experiment
from tests import families, toy

RUN = """
include 'experiment.gin'
include 'models/decoder_tiny.gin'
include 'data/text_char.gin'
include 'optimizers/adamw_cosine.gin'
include 'meshes/data_parallel.gin'
STEPS = 6
BATCH_SIZE = 8
SEQUENCE_LENGTH = 16
WARMUP_STEPS = 2
DecoderConfig.d_model = 16
StackConfig.num_layers = 2
MLPConfig.d_ff = 32
RunConfig.evaluate_every_steps = 6
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a finished run, and its model exported in several files."""
    directory = tmp_path_factory.mktemp("trained")
    toy.write_text(directory)
    (directory / "run.gin").write_text(RUN)
    bindings = {
        "TEXT_FILES": directory / "text.txt",
        "MODEL_DIR": directory / "run",
        "DecoderConfig.vocab_size": 32,  # padded: the text has fewer characters
        "LoggingConfig.sample_tokens": 0,
        "RunConfig.logging": "@LoggingConfig()",
        "RunConfig.ema_decay": 0.9,
    }
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    assert main(["train", f"--gin_file={directory}/run.gin", *flags]) == 0
    assert main(["convert", f"--from={directory}/run", f"--to={directory}/hf", "--max_file_gb=4e-6"]) == 0
    return directory


def arrays(directory):
    return {name: np.array(tensor.read()) for name, tensor in open_tensors(directory).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            theirs[name].dtype, theirs[name].shape, theirs[name].tobytes()
        ), name  # fmt: skip


def test_a_trained_model_goes_there_and_back(trained, tmp_path, capsys):
    exported = trained / "hf"
    assert (exported / INDEX).exists()
    fields = json.loads((exported / "config.json").read_text())
    assert (fields["model_type"], fields["dtype"], fields["max_position_embeddings"]) == ("llama", "float32", 16)
    characters = len(set((trained / "text.txt").read_text()))
    assert fields["vocab_size"] == characters < 32

    assert main(["convert", f"--from={exported}", f"--to={tmp_path}/again", "--vocab_size=32"]) == 0
    assert "llama" in capsys.readouterr().out
    placement = place(MeshConfig(data=1, fsdp=-1))
    run, again = (load_saved(RunDirectory(path), placement) for path in (trained / "run", tmp_path / "again"))
    assert again.config.vocab_size == run.config.vocab_size == 32
    run_layers, layers = run.params["stack"]["unrolled"], again.params["stack"]["scanned"]["0"]
    for i in range(2):  # the run's layers are unrolled
        layer = jax.tree.map(lambda a, i=i: a[i], layers)
        jax.tree.map(np.testing.assert_array_equal, layer, run_layers[str(i)])

    imported = Checkpoints(tmp_path / "again" / "checkpoints", CheckpointConfig())
    unrolled = restore_params(imported, run.config, placement, 0)
    jax.tree.map(np.testing.assert_array_equal, unrolled["stack"], run.params["stack"])

    # It is no run: nothing says what data it would go on with.
    assert main(["generate", f"--model_dir={tmp_path}/again"]) == 2
    assert main(["train", f"--gin_file={trained}/run/operative_config.gin", f"--gin.MODEL_DIR={tmp_path}/again"]) == 2

    assert main(["convert", f"--from={tmp_path}/again", f"--to={tmp_path}/hf", "--step=0"]) == 0
    assert_same(arrays(tmp_path / "hf"), arrays(exported))
    assert (tmp_path / "hf" / "config.json").read_text() == (exported / "config.json").read_text()


def test_a_run_that_scans_its_layers_from_now_on_exports_the_same_bytes(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    run = [f"--gin_file={trained}/run/operative_config.gin", f"--gin.MODEL_DIR={tmp_path}/run"]
    assert main(["train", *run, "--gin.StackConfig.scan_layers=True", "--gin.RunConfig.steps=7"]) == 0
    # The checkpoint of step 6 has the layers unrolled, and the run's configuration is that of scanned ones.
    for step in (6, 7):
        assert main(["convert", f"--from={tmp_path}/run", f"--to={tmp_path}/{step}", f"--step={step}"]) == 0
    assert_same(arrays(tmp_path / "6"), arrays(trained / "hf"))
    assert arrays(tmp_path / "7").keys() == arrays(tmp_path / "6").keys()


@pytest.mark.hf
def test_transformers_computes_what_a_trained_model_does(trained):
    pytest.importorskip("torch", reason="needs the extra: hf")
    pytest.importorskip("transformers", reason="needs the extra: hf")
    theirs = families.load(trained / "hf")
    saved = load_saved(RunDirectory(trained / "run"), place(MeshConfig(data=1, fsdp=-1)))
    tokens = np.random.default_rng(0).integers(0, saved.vocab_size, (2, 16))
    model = merge(model_spec(saved.config).graphdef, saved.params)
    ours = model.logits(model(tokens)[0])[..., : saved.vocab_size]
    np.testing.assert_allclose(ours, families.logits(theirs, tokens), atol=1e-4)


TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 28}, "merges": []}, "added_tokens": []}


@pytest.mark.hf
@pytest.mark.parametrize("name", ["gpt2", "mistral_window", "gemma3", "qwen3_moe_dense_layer", "deepseek_v3"])
def test_a_model_of_several_files_comes_and_goes(name, tmp_path):
    theirs = families.build(name)
    source = families.save(theirs, tmp_path / "hf", max_shard_size="10KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    (source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (source / "merges.txt").write_text("a b\n")
    assert main(["convert", f"--from={source}", f"--to={tmp_path}/ours"]) == 0
    assert main(["convert", f"--from={tmp_path}/ours", f"--to={tmp_path}/back", "--max_file_gb=1e-5"]) == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same(arrays(tmp_path / "back"), arrays(source))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "merges.txt"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    tokens, again = families.tokens(), families.load(tmp_path / "back")
    np.testing.assert_array_equal(families.logits(again, tokens), families.logits(theirs, tokens))

    run = f"include '{tmp_path}/ours/model.gin'\n" + RUN.replace("include 'models/decoder_tiny.gin'\n", "")
    run = "\n".join(line for line in run.splitlines() if not line.startswith(("Decoder", "Stack", "MLP")))
    (tmp_path / "run.gin").write_text(run)
    config = parse_config([f"{tmp_path}/run.gin"], ["TEXT_FILES=x", "MODEL_DIR=y"])
    assert config.build(Experiment).model == read_config(source).config


def refused(argv, capsys):
    assert main(["convert", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_mistakes_are_named_and_leave_nothing(trained, tmp_path, capsys):
    exported, new = trained / "hf", f"--to={tmp_path}/new"
    assert "needs --from=DIRECTORY" in refused([new], capsys)
    assert "holds no model" in refused([f"--from={tmp_path}", new], capsys)
    assert "exists: choose" in refused([f"--from={exported}", f"--to={tmp_path}"], capsys)
    assert "takes no gin files" in refused([f"--from={exported}", new, "--gin.STEPS=1"], capsys)
    assert "padding only adds" in refused([f"--from={exported}", new, "--vocab_size=3"], capsys)
    assert "--step has no effect when importing" in refused([f"--from={exported}", new, "--step=5"], capsys)
    assert "--vocab_size has no effect" in refused([f"--from={trained}/run", new, "--vocab_size=64"], capsys)
    assert "no checkpoint of step 5" in refused([f"--from={trained}/run", new, "--step=5"], capsys)
    assert "could not be made" in refused([f"--from={exported}", "--to=/proc/new"], capsys)
    assert list(tmp_path.iterdir()) == []


def damaged_copy(source, directory, **files):
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        (directory / name.replace("_json", ".json")).write_text(content)
    return directory


def test_damaged_models_are_named_and_leave_nothing(trained, tmp_path, capsys):
    exported, new = trained / "hf", f"--to={tmp_path}/new"
    too_large = json.dumps({**TOKENIZER, "added_tokens": [{"id": 99}]})
    other = damaged_copy(exported, tmp_path / "other", tokenizer_json=too_large)
    assert "has the token 99, but the model's vocab_size" in refused([f"--from={other}", new], capsys)
    other = damaged_copy(exported, tmp_path / "no_vocabulary", tokenizer_json="{}")
    assert "is damaged" in refused([f"--from={other}", new], capsys)
    other = damaged_copy(exported, tmp_path / "cut")
    last = sorted(other.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    assert f"{last.name} is truncated" in refused([f"--from={other}", new], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "no_vocabulary", "other"]


def test_a_failure_while_writing_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5x_like.huggingface.safetensors._write_file", fail)
    assert "No space left" in refused([f"--from={trained}/run", f"--to={tmp_path}/new"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_family_is_refused(tmp_path, capsys):
    toy.write_text(tmp_path)
    flags = {"TEXT_FILES": tmp_path / "text.txt", "MODEL_DIR": tmp_path / "run", "STEPS": 2, "BATCH_SIZE": 8,
             "SEQUENCE_LENGTH": 16, "DecoderConfig.d_model": 16, "WARMUP_STEPS": 1}  # fmt: skip
    gin = [f"--gin.{name}={value}" for name, value in flags.items()]
    assert main(["train", "--gin_file=runs/nanogpt_char.gin", *gin]) == 0
    capsys.readouterr()
    message = refused([f"--from={tmp_path}/run", f"--to={tmp_path}/new"], capsys)
    assert "the nearest, gpt2, would need" in message
    assert "stack.block.mixer.use_qkv_bias: True (here False)" in message
