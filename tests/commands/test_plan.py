import dataclasses
import json
from pathlib import Path

import pytest

from t5x_like.commands import plan, train
from t5x_like.commands.dry_run import known_vocabulary
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import ByteTokenizer, ByteTokenizerConfig, SpecialTokens
from tests import toy

RUN = ("--gin_file=runs/quickstart.gin", "--gin.MODEL_DIR=unused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "plan needs --topology"),
        (("--topology=v9:2x2",), r"there is no such topology. Known are:\n  v4:2x2x1 (4)"),
        (("--topology=v5e:2x3",), "v5e has no such shape"),
        (("--topology=cpu:3", "--gin.MeshConfig.data=2"), "does not fill 3 devices"),
        (("--topology=cpu:4", "--gin_file=data/text_char.gin", "--gin.TEXT_FILES=x"), "--vocab_size"),
    ],
)
def test_mistakes_have_one_message(arguments, message, capsys):
    assert plan.main([*RUN, *arguments]) == 2
    assert message.replace("\\n", "\n") in capsys.readouterr().err


def test_a_plan_is_shown_and_written(tmp_path, capsys):
    small = ["--gin.StackConfig.num_layers=1", "--gin.DecoderConfig.d_model=32", "--gin.BATCH_SIZE=2"]
    written = tmp_path / "plan.json"
    assert plan.main([*RUN, *small, "--topology=cpu:2", "--vocab_size=128", f"--json={written}"]) == 0
    facts = json.loads(written.read_text())
    assert facts["mesh"]["data"] == 2
    assert facts["tokens_per_step"] == 2 * 128
    shown = capsys.readouterr().out
    assert "MEMORY per device" in shown
    assert "parameters" in shown


def test_a_runs_measured_steps_stand_beside_the_plan(tmp_path, capsys):
    """The run's own configuration and devices are found in its directory."""
    directory = tmp_path / "run"
    small = ["--gin.StackConfig.num_layers=1", "--gin.DecoderConfig.d_model=32", "--gin.BATCH_SIZE=8"]
    bytes_only = ["--gin.DataConfig.tokenizer=@ByteTokenizerConfig()", "--gin.SEQUENCE_LENGTH=32"]
    (tmp_path / "text.txt").write_text("all work and no play makes a dull test\n" * 200)
    text = [
        "--gin_file=data/text.gin",
        f"--gin.TEXT_FILES={tmp_path / 'text.txt'}",
        "--gin.DataConfig.split='position'",
    ]
    logs = ["--gin.RunConfig.logging=@LoggingConfig()", "--gin.LoggingConfig.every_steps=1", "--gin.STEPS=4"]
    arguments = ["--gin_file=runs/quickstart.gin", *text, *small, *bytes_only, *logs, f"--gin.MODEL_DIR={directory}"]
    assert train.main([*arguments, "--gin.LoggingConfig.sample_tokens=0", "--gin.WARMUP_STEPS=1"]) == 0
    assert plan.main([f"--compare={directory}"]) == 0
    shown = capsys.readouterr().out
    assert "on cpu:8" in shown
    assert "median of 3 records on 8 x cpu" in shown


@pytest.mark.parametrize("special", [SpecialTokens(), SpecialTokens(num_sentinels=7)])
def test_the_vocabulary_is_the_one_that_training_has(special):
    """Of a trained tokenizer as configured, of bytes as built, both with the tokens added to them."""
    for tokenizer in (ByteTokenizerConfig(special_tokens=special), SentencePieceConfig(special_tokens=special)):
        experiment = toy.experiment(Path("unused"))
        data = dataclasses.replace(experiment.data, tokenizer=tokenizer)
        added = special.extend(ByteTokenizer()).vocab_size - 259
        plain = 259 if isinstance(tokenizer, ByteTokenizerConfig) else tokenizer.vocab_size
        assert known_vocabulary(dataclasses.replace(experiment, data=data)) == plain + added
