import fcntl
import json
import os
import subprocess
import sys

import pytest

from t5x_like.checkpoints.run_directory import LOCK, RunDirectory
from t5x_like.commands.main import main
from t5x_like.errors import UserError
from t5x_like.files import write_atomic

HOLDER = """
import sys, time
from t5x_like.checkpoints.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).writing():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time_until_it_is_killed(tmp_path):
    path = tmp_path / "runs" / "a"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    refusal = pytest.raises(UserError, match=rf"{path} is in use by process {holder.pid} on \S+: wait for it")
    with refusal, RunDirectory(path).writing():
        pass
    assert str(holder.pid) in (path / LOCK).read_text(), "a refused writer leaves the holder's name"
    holder.kill()
    holder.wait()
    with RunDirectory(path).writing():
        assert (path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_ends_with_the_block(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), RunDirectory(tmp_path).writing():
            raise KeyError


def test_without_locks_in_the_file_system_a_run_is_possible(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunDirectory(tmp_path).writing():
        pass
    assert "no other run" in caplog.text


def test_errors_within_the_block_are_not_the_directorys(tmp_path):
    with pytest.raises(FileNotFoundError), RunDirectory(tmp_path).writing():
        (tmp_path / "missing").read_text()


def test_unusable_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    for i in range(5):
        (tmp_path / "thesis" / f"{i}.tex").touch()
    for path, message in (
        (tmp_path / "file", "is a file: choose a directory"),
        (tmp_path / "file" / "below", "cannot be written .Not a directory.: choose"),
        ("/proc/no/such", "cannot be written"),
        (tmp_path / "thesis", r"is no run but holds 5 other files or directories \(0.tex, 1.tex, 2.tex\)"),
    ):
        with pytest.raises(UserError, match=message), RunDirectory(path).writing():
            pass
    assert not (tmp_path / "thesis" / LOCK).exists()


def test_a_copied_run_can_go_on(tmp_path):
    (tmp_path / "operative_config.gin").touch()
    with RunDirectory(tmp_path).writing():
        pass


def test_readers_need_a_run_and_no_lock(tmp_path):
    directory = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="holds no run: train first"):
        directory.require()
    with directory.writing():
        write_atomic(directory.operative_config, "MODEL_DIR = 'a'\n")
        RunDirectory(tmp_path).require()


def test_another_experiment_is_refused_with_the_differences(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.check_same_experiment([])
    with pytest.raises(UserError, match=r"another configuration:\n  d_model: 64 -> 128\n  b: 1 -> 2\nContinue"):
        directory.check_same_experiment(["d_model: 64 -> 128", "b: 1 -> 2"])


def test_a_run_of_an_older_version_is_refused_with_the_reason(tmp_path, capsys):
    (tmp_path / "operative_config.gin").write_text("BlockConfig.attention = @AttentionConfig()\n")
    (tmp_path / "config.json").write_text(json.dumps({"experiment": {}, "versions": {"t5x_like": "0.1.0"}}))
    for arguments in (["evaluate", f"--model_dir={tmp_path}"], ["generate", f"--model_dir={tmp_path}"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "a run of t5x_like 0.1.0" in error
        assert "train it anew" in error
    with pytest.raises(UserError, match=r"a run of t5x_like 0\.1\.0"):
        RunDirectory(tmp_path).read_config()
