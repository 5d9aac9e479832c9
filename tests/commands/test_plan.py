import json

import pytest

from t5x_like.commands import plan

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
