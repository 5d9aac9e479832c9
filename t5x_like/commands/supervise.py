"""`train --restarts=N`: trains in a process of its own, and starts it again when it crashes or hangs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.checkpoints.run_directory import RunDirectory

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
STOP = (signal.SIGINT, signal.SIGTERM)
FINAL_CODES = (0, 2)
"""Complete or stopped on request; a mistake of the user, which another start would meet again."""


def supervise(arguments: Sequence[str], directory: RunDirectory, restarts: int) -> int:
    """Runs `t5x_like` with these arguments until it ends by itself, and returns its exit code.

    Signals that stop a training, or ask it to save, are passed on. After a crash it waits for a second, then two, four,
    up to a minute; a new checkpoint counts as progress, after which both the waits and the restarts begin anew.

    Args:
      arguments: of the command; `--restarts` in them is overruled.
      directory: of the run.
      restarts: how many times in a row, without progress, it is started again.
    """
    trainer = _Trainer([sys.executable, "-m", "t5x_like", *arguments, "--restarts=0"])
    failures, best = 0, _latest_step(directory)
    while True:
        code = trainer.run()
        if code in FINAL_CODES or trainer.stopping:
            return code if code >= 0 else 128 - code
        step = _latest_step(directory)
        failures, best = (1, step) if step > best else (failures + 1, best)
        # A negative code is the number of the signal that killed it.
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if failures > restarts:
            logging.error("Training %s, and %d restarts have brought no new checkpoint: giving up.", ended, restarts)
            return code if code > 0 else 128 - code
        wait = min(FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS)
        logging.error("Training %s: starting it again in %g s, from step %d.", ended, wait, step)
        trainer.wait(wait)
        if trainer.stopping:
            return 0


class _Trainer:
    """The process that trains, one after the other.

    Attributes:
      stopping: True once a signal asked to stop.
    """

    def __init__(self, command: Sequence[str]):
        self.stopping = False
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        for number in (*STOP, signal.SIGUSR1):
            signal.signal(number, self._pass_on)

    def run(self) -> int:
        """Starts it, waits for its end, and returns its exit code."""
        # A process group of its own: Ctrl-C in a terminal reaches this process alone, which passes it on, once.
        self._process = subprocess.Popen(self._command, process_group=0)
        return self._process.wait()

    def wait(self, seconds: float) -> None:
        """Waits, unless asked to stop."""
        deadline = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < deadline:
            time.sleep(0.1)

    def _pass_on(self, number: int, frame: Any) -> None:
        self.stopping = self.stopping or number in STOP
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)


def _latest_step(directory: RunDirectory) -> int:
    return Checkpoints(directory.checkpoints, CheckpointConfig()).latest_step() or 0
