import signal

import pytest

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import supervise as module
from t5x_like.commands.supervise import supervise


@pytest.fixture(autouse=True)
def signals():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    former = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def run(monkeypatch, tmp_path, lives, restarts=2):
    """Runs trainers that end as told, each (exit code, newest step then); returns code, waits and the command."""
    waits, commands, step = [], [], [0]
    lives = iter(lives)

    def one_life(self):
        commands.append(self._command)
        code, step[0] = next(lives)
        return code

    monkeypatch.setattr(module._Trainer, "run", one_life)
    monkeypatch.setattr(module._Trainer, "wait", lambda self, seconds: waits.append(seconds))
    monkeypatch.setattr(module, "_latest_step", lambda directory: step[0])
    code = supervise(["train", "--gin_file=a.gin", "--restarts=2"], RunDirectory(tmp_path), restarts)
    assert next(lives, None) is None
    return code, waits, commands


def test_a_crashed_trainer_is_started_again_with_growing_waits(monkeypatch, tmp_path, caplog):
    code, waits, commands = run(monkeypatch, tmp_path, [(1, 0), (-9, 0), (0, 5)])
    assert (code, waits) == (0, [1.0, 2.0])
    assert commands[0][1:] == ["-m", "t5x_like", "train", "--gin_file=a.gin", "--restarts=2", "--restarts=0"]
    assert "ended with code 1: starting it again in 1 s, from step 0" in caplog.text
    assert "was killed by SIGKILL: starting it again in 2 s" in caplog.text


def test_a_new_checkpoint_is_progress(monkeypatch, tmp_path):
    code, waits, _ = run(monkeypatch, tmp_path, [(1, 0), (1, 0), (1, 10), (1, 20), (1, 20), (0, 30)])
    assert (code, waits) == (0, [1.0, 2.0, 1.0, 1.0, 2.0])


def test_without_progress_it_gives_up(monkeypatch, tmp_path, caplog):
    code, waits, _ = run(monkeypatch, tmp_path, [(134, 4), (-6, 4), (-6, 4)])
    assert (code, waits) == (134, [1.0, 2.0])
    assert "giving up" in caplog.text


def test_a_mistake_of_the_user_is_not_tried_again(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, [(2, 0)])[:2] == (2, [])


def test_waits_are_bounded(monkeypatch, tmp_path):
    _, waits, _ = run(monkeypatch, tmp_path, [(1, 0)] * 12 + [(0, 0)], restarts=20)
    assert waits[-4:] == [60.0] * 4
