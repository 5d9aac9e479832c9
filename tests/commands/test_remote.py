"""A run whose MODEL_DIR is on object storage, here an emulator of Google's in this process."""

import socket
from pathlib import Path

import pytest
from etils import epath
from gcp_storage_emulator.server import create_server

from t5x_like.commands.main import main
from t5x_like.reporting.metrics import read_metrics
from tests import toy
from tests.commands.test_train import flags


@pytest.fixture
def bucket(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    # No search for credentials: the emulator asks for none.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield "gs://bucket"
    server.stop()


def records(path: Path | epath.Path, copy: Path) -> list[dict]:
    copy.write_bytes(path.read_bytes())
    speeds = {"tokens_per_second", "seconds_per_step", "waiting_for_data", "mfu", "learning_rate"}
    return [{name: value for name, value in record.items() if name not in speeds} for record in read_metrics(copy)]


def test_a_run_on_object_storage_is_resumed_and_evaluated_from_there(bucket, tmp_path, capsys):
    toy.write_text(tmp_path)
    remote = f"{bucket}/runs/a"
    assert main(["train", *flags(tmp_path)]) == 0
    assert main(["train", *flags(tmp_path, MODEL_DIR=remote)]) == 0
    for step in (30, 40):
        epath.Path(f"{remote}/checkpoints/{step}").rmtree()
    assert main(["train", *flags(tmp_path, MODEL_DIR=remote)]) == 0
    assert f"metrics: {remote}/metrics.jsonl; checkpoints: {remote}/checkpoints" in capsys.readouterr().out

    steps = sorted(path.name for path in epath.Path(f"{remote}/checkpoints").iterdir())
    assert steps == sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    here = records(tmp_path / "run" / "metrics.jsonl", tmp_path / "copy")
    there = records(epath.Path(remote) / "metrics.jsonl", tmp_path / "copy")
    assert there == here
    assert main(["evaluate", f"--model_dir={remote}"]) == 0
    assert main(["generate", f"--model_dir={remote}", "--greedy", "--max_new_tokens=5"]) == 0
    capsys.readouterr()
    assert main(["train", *flags(tmp_path, MODEL_DIR=remote, SEED=3)]) == 2
    assert "run.seed" in capsys.readouterr().err


def test_a_bucket_that_is_not_there_is_one_message(bucket, tmp_path, capsys):
    toy.write_text(tmp_path)
    assert main(["train", *flags(tmp_path, MODEL_DIR="gs://missing/run")]) == 2
    assert "gs://missing/run" in capsys.readouterr().err
