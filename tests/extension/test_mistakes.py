"""What a plugin, or a binding of a role, may get wrong: one message each."""

import re

import pytest

from t5x_like.commands.main import main

ROLE = "from t5x_like.configurable import configurable\nfrom t5x_like.training.optimizers import Algorithm\n\n"
RUN = ["--gin_file=runs/quickstart.gin"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "@configurable\nclass Bare(Algorithm):\n    b1: float = 0.9\n",
            "Bare lacks direction: define all methods of its role Algorithm (direction).",
        ),
        (
            "@configurable\nclass AdamWConfig(Algorithm):\n    def direction(self, layouts):\n        return None\n",
            "AdamWConfig is already a configurable of t5x_like.training.optimizers: choose another name.",
        ),
        (
            "from t5x_like.data.tokenizers import Tokenizer\n\nclass Mine(Tokenizer, kind='byte'):\n    pass\n",
            "Mine: t5x_like.data.tokenizers has a tokenizer of kind 'byte': choose another.",
        ),
        ("import no_such_package\n", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package' ("),
    ],
)
def test_a_plugin_that_cannot_be_used(plugin, capsys, text, message):
    assert main(["train", plugin(ROLE + text), *RUN]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --plugin=my_parts")
    assert message in shown
    assert shown.count("\n") == 1


MINE = ROLE + "@configurable\nclass Mine(Algorithm):\n    def direction(self, layouts):\n        return None\n"


def test_a_class_of_another_role_is_refused_and_the_fitting_ones_are_listed(plugin, capsys):
    assert main(["train", plugin(MINE), *RUN, "--gin.OptimizerConfig.algorithm=@CosineSchedule()"]) == 2
    listed = re.search(
        r"OptimizerConfig.algorithm must be Algorithm \((.*)\), got @CosineSchedule\(\) \(command line\)",
        capsys.readouterr().err,
    )
    assert {"AdamWConfig", "MuonConfig", "Mine"} <= set(re.findall(r"\w+", listed[1]))
    assert "CosineSchedule" not in listed[1]


def test_explain_lists_the_classes_of_a_role(plugin, capsys):
    assert main(["train", plugin(MINE), "--explain=OptimizerConfig.algorithm"]) == 0
    listed = re.match(r"OptimizerConfig.algorithm: Algorithm \((.*)\)\n", capsys.readouterr().out)
    assert {"AdamWConfig", "MuonConfig", "Mine"} <= set(re.findall(r"\w+", listed[1]))


def test_a_mixture_of_texts_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    source = ["--gin.DataConfig.source=@Mixture()", "--gin.Mixture.sources=(@TextSource(),)"]
    assert main(["train", *RUN, *source, f"--gin.TextSource.files={tmp_path}/a.txt"]) == 2
    assert "@TextSource() is neither a prepared corpus nor a task" in capsys.readouterr().err
