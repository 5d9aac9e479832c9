import os
import signal
import subprocess
import sys
import time

import pytest

from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.training import loop
from t5x_like.training.signals import Requests
from tests import toy
from tests.training.test_loop import train

RARELY = CheckpointConfig(save_every_steps=100, keep_last=10)


def test_requests_are_looked_at_every_few_steps_and_answered_once(tmp_path):
    clock = [False]
    with Requests(tmp_path, lambda: clock[0], every_steps=5) as requests:
        assert not any(requests.save(step) for step in range(11))
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "save_now").touch()
        assert [requests.save(step) for step in range(11, 21)] == [False] * 4 + [True] + [False] * 5
        assert not (tmp_path / "save_now").exists()
        clock[0] = True
        assert requests.save(25)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("how", ["signal", "file", "clock"])
def test_a_checkpoint_on_request(tmp_path, monkeypatch, how):
    toy.write_text(tmp_path)
    original = loop.Reporter.advance

    def advance(self, step, metrics):
        original(self, step, metrics)
        if step == 3 and how == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        if step == 3 and how == "file":
            (tmp_path / "run" / "save_now").touch()

    monkeypatch.setattr(loop.Reporter, "advance", advance)
    if how == "clock":
        steps = []
        monkeypatch.setattr(loop.Checkpoints, "overdue", lambda self: steps.append(0) or len(steps) == 3)
    assert train(toy.experiment(tmp_path, checkpoints=RARELY)).complete
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "6"]


BUSY = """
import sys, time
from pathlib import Path
from t5x_like.training.signals import Requests
with Requests(Path("."), lambda: False, 1) as requests:
    print("ready", flush=True)
    while not requests.stop(0):
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(first, second):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == "saving\n"
    start = time.monotonic()
    process.send_signal(second)
    assert process.wait(30) == 128 + second
    assert time.monotonic() - start < 5
    assert "again: stops at once" in process.communicate()[1]
