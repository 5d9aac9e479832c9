import json

import pytest

from t5x_like.commands.main import main
from t5x_like.data.prepared import prepared_tokenizer
from tests.browser import shown


@pytest.fixture
def folder(tmp_path):
    rows = [f"Document number {i} says that {i} times {i} is {i * i}.\n" * (1 + i % 3) for i in range(200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


def prepare(folder, *flags):
    return main(
        ["prepare", f"--from={folder}/in.jsonl", f"--to={folder}/out", "--gin.VOCAB_SIZE=300", "--workers=1", *flags]
    )


def test_prepare_then_train(folder, capsys):
    assert prepare(folder) == 0
    out = capsys.readouterr().out
    assert "200 of 200 documents" in out
    assert f"{folder}/out/report.html" in out
    assert prepared_tokenizer(folder / "out").vocab_size == 300
    _, command = out.strip().splitlines()[-1].split(": t5x_like ")
    assert main([*command.split(), "--gin.BATCH_SIZE=8", "--dry_run"]) == 0
    assert "8 x 128 = 1,024" in capsys.readouterr().out


def test_it_is_done_once(folder, capsys):
    assert prepare(folder) == 0
    before = (folder / "out" / "prepared.json").stat().st_mtime_ns
    assert prepare(folder) == 0
    assert (folder / "out" / "prepared.json").stat().st_mtime_ns == before
    assert prepare(folder, "--gin.VOCAB_SIZE=310") == 2
    assert "choose another directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to=x"], "PrepareConfig.files"),
        (["--from=missing.txt", "--to=x"], "no file matches 'missing.txt'"),
        (["--from=a.txt", "--to=gs://bucket"], "gcsfuse"),
        (["--from=a.txt", "--to=x", "--gin_file=prepare/none.gin"], "none.gin"),
        (["--from=a.txt", "--to=x", "--workers=0"], "workers"),
    ],
)
def test_mistakes(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_configuration_can_be_asked_for(capsys):
    assert main(["prepare", "--explain=NearDuplicates.threshold"]) == 0
    assert "Smallest estimate" in capsys.readouterr().out
    assert main(["prepare", "--from=a.txt", "--to=b", "--print_config"]) == 0
    assert "files = ('a.txt',)" in capsys.readouterr().out


@pytest.mark.browser
def test_a_browser_shows_the_report_and_runs_nothing_in_it(folder):
    evil = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
    with open(folder / "in.jsonl", "a") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in (evil * 3, evil * 3)))
    assert prepare(folder) == 0
    document = shown(folder / "out" / "report.html", folder / "picture.png")
    assert "&lt;script&gt;" in document
    assert "<title>run" not in document
    assert (folder / "picture.png").stat().st_size > 10_000
