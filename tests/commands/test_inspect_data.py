import pytest

from t5x_like.commands.main import main


@pytest.fixture
def run(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"Line {i}, of many lines.\n" for i in range(300)))
    flags = ["--gin_file=runs/nanogpt_char.gin", f"--gin.TEXT_FILES={tmp_path}/text.txt"]
    return [*flags, f"--gin.MODEL_DIR={tmp_path}/run", "--gin.SEQUENCE_LENGTH=16", "--gin.BATCH_SIZE=4"]


def test_a_batch_in_the_terminal(run, capsys):
    assert main(["inspect-data", *run, "--step=3", "--rows=2"]) == 0
    out = capsys.readouterr().out
    assert "train batch of step 3" in out
    assert "decoder tokens: 4 x 16, 100.0% filled" in out
    assert "row 1, decoder" in out
    assert "row 2" not in out
    assert main(["inspect-data", *run, "--step=3", "--rows=2"]) == 0
    assert capsys.readouterr().out == out


def test_a_page(run, capsys, tmp_path):
    assert main(["inspect-data", *run, "--split=validation", f"--html={tmp_path}/batch.html"]) == 0
    assert "validation batch of step 0, 4 of 4 rows" in capsys.readouterr().out
    assert (tmp_path / "batch.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split=validation", "--step=1000"], "validation has the batches 0 to"),
        (["--html=/no/such/folder/x.html"], "cannot be written"),
        (["--step=-1"], "step"),
    ],
)
def test_mistakes(run, flags, message, capsys):
    assert main(["inspect-data", *run, *flags]) == 2
    assert message in capsys.readouterr().err
