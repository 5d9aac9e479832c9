"""What comes to a run from outside: signals to stop or to save, a file that asks for a checkpoint, the clock.

All processes of a run act on the same step.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
from absl import logging
from jax.experimental import multihost_utils

from t5x_like.runtime.coordination import from_first_process

SAVE_FILE = "save_now"
"""A file of this name in MODEL_DIR asks for a checkpoint; it is removed when one is made."""


class Requests:
    """Listens from `with` on.

    SIGINT or SIGTERM asks to stop after the current step; a second one ends the process at once. SIGUSR1 asks for a
    checkpoint. Only the main thread may handle signals; a training in another one is stopped by its owner.
    """

    def __init__(self, directory: Path, overdue: Callable[[], bool], every_steps: int):
        """Takes MODEL_DIR, whether the clock asks for a checkpoint, and the steps between looks at it and the file."""
        self._file = directory / SAVE_FILE
        self._overdue, self._every_steps = overdue, every_steps
        self._stop = self._save = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._stopped, signal.SIGTERM: self._stopped, signal.SIGUSR1: self._asked}
            if jax.process_count() > 1:
                # JAX listens for SIGTERM itself, and tells all processes of one that reaches any of them.
                del handlers[signal.SIGTERM]
                handlers[signal.SIGINT] = lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)
            self._former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def stop(self, step: int) -> bool:
        """True if the run is to end after this step; every process asks after every step."""
        if jax.process_count() > 1 and not self._stop and multihost_utils.reached_preemption_sync_point(step):
            self._stopped(signal.SIGTERM, None)
        return self._stop

    def save(self, step: int) -> bool:
        """True if a checkpoint is asked for at this step; every process asks after every step."""
        if step % self._every_steps:
            return False
        return from_first_process(str(self._wanted())) == str(True)

    def _wanted(self) -> bool:
        if jax.process_index() != 0:
            return False
        by_file = self._file.exists()
        self._file.unlink(missing_ok=True)
        by_signal, self._save = self._save, False
        return by_file or by_signal or self._overdue()

    def _stopped(self, number: int, frame: Any) -> None:
        self._stop = True
        for again in (signal.SIGINT, signal.SIGTERM):
            if threading.current_thread() is threading.main_thread():
                signal.signal(again, _exit_at_once)
        logging.warning("%s: saving and stopping after this step; again: stops at once.", signal.Signals(number).name)

    def _asked(self, number: int, frame: Any) -> None:
        self._save = True


def _exit_at_once(number: int, frame: Any) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # The progress bar hid the cursor.
    os._exit(128 + number)
