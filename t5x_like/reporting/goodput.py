"""Where a run's time goes, by cause, over all of its starts: `goodput.json`."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from t5x_like.files import write_atomic

CAUSES = {
    "step": "training steps",
    "data_wait": "waiting for data",
    "init": "starting up",
    "compile": "compiling",
    "evaluate": "evaluating",
    "save": "saving",
    "restart": "being down",
    "lost": "steps done again",
}
"""Causes and their names in words. `restart`: from the last sign of a killed process to the start of the next."""

WRITE_SECONDS = 5.0
KEPT_MARKS = 20


class Goodput:
    """Accounts every second to one cause. Counts the seconds of this process itself; files are written by one."""

    def __init__(
        self,
        path: Path,
        *,
        writes: bool = True,
        seconds_before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        """Goes on from what former starts left in the file.

        Args:
          path: of the file.
          writes: False leaves it to another process.
          seconds_before: time since this process started; it counts as `init`.
          clock: seconds since any time, never set back.
          wall_clock: seconds since 1970; may be set.
        """
        self._path, self._writes, self._clock, self._wall_clock = path, writes, clock, wall_clock
        former = _read(path)
        self.seconds = {cause: float(former.get("seconds", {}).get(cause, 0.0)) for cause in CAUSES}
        self.starts = int(former.get("starts", 0)) + 1
        # Step seconds when a checkpoint was saved, by step: what came after is lost with a return to it.
        self._marks = {int(step): float(seconds) for step, seconds in former.get("marks", {}).items()}
        # The first of the calls of `write` writes, so that no start which came to train is forgotten.
        self._cause, self._since, self._waited, self._written = "init", clock(), 0.0, -math.inf
        self.seconds["init"] += seconds_before
        if former and not former.get("ended", False):
            down = wall_clock() - seconds_before - float(former["time"])
            self.seconds["restart"] += max(down, 0.0)

    @contextlib.contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """Accounts the time within to a cause, and what follows to the former one again."""
        former = self._cause
        self.enter(cause)
        try:
            yield
        finally:
            self.enter(former)

    def enter(self, cause: str) -> None:
        """Accounts the time from now on to a cause."""
        now = self._clock()
        self.seconds[self._cause] += now - self._since
        self._cause, self._since = cause, now

    def waited(self, seconds: float) -> None:
        """Takes seconds of waiting for data out of those of steps; given the sum since training went on."""
        self.enter(self._cause)
        moved = min(seconds - self._waited, self.seconds["step"])
        self.seconds["step"] -= moved
        self.seconds["data_wait"] += moved
        self._waited = seconds

    def resumed(self, step: int) -> None:
        """Tells that training goes on from the checkpoint of a step (0: none): steps made since are lost."""
        self.enter(self._cause)
        lost = max(self.seconds["step"] - self._marks.get(step, 0.0 if step == 0 else self.seconds["step"]), 0.0)
        self.seconds["step"] -= lost
        self.seconds["lost"] += lost
        self._marks = {saved: seconds for saved, seconds in self._marks.items() if saved <= step}
        self._waited = 0.0

    def saved(self, step: int) -> None:
        """Tells that the state of a step is being saved."""
        self.enter(self._cause)
        self._marks[step] = self.seconds["step"]
        self._marks = dict(sorted(self._marks.items())[-KEPT_MARKS:])

    def write(self, *, ended: bool = False) -> None:
        """Writes the file, unless it was written just now; `ended`: at once, and what follows is no downtime."""
        self.enter(self._cause)
        if not self._writes or (not ended and self._since - self._written < WRITE_SECONDS):
            return
        self._written = self._since
        record = {
            "seconds": {cause: round(seconds, 3) for cause, seconds in self.seconds.items()},
            "goodput": round(self.share("step"), 4),
            "starts": self.starts,
            "time": self._wall_clock(),
            "ended": ended,
            "marks": {step: round(seconds, 3) for step, seconds in self._marks.items()},
        }
        try:
            write_atomic(self._path, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            logging.warning("%s could not be written: %s.", self._path, error)

    def share(self, cause: str) -> float:
        """The share of all time that went into a cause."""
        return self.seconds[cause] / max(sum(self.seconds.values()), 1e-9)

    def describe(self) -> str:
        """One line for the end of a run."""
        minutes, seconds = divmod(round(sum(self.seconds.values())), 60)
        shares = [(self.share(cause), words) for cause, words in CAUSES.items()]
        parts = ", ".join(f"{words} {share:.1%}" for share, words in sorted(shares, reverse=True) if share >= 0.0005)
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        return f"Time: {minutes}:{seconds:02}{starts}: {parts}."


def seconds_since_process_start() -> float:
    """How long this process has been running; 0 where the system does not tell (other than Linux)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, AttributeError, ValueError):
        return 0.0


def _read(path: Path) -> dict[str, Any]:
    """What former starts wrote; nothing if the file is missing or damaged, for it must not stop a run."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        numbers = [*record["seconds"].values(), *record["marks"].values(), record["time"], record["starts"]]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError("a value is no number")
        [int(step) for step in record["marks"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logging.warning("%s is damaged and starts anew: %r", path, error)
        return {}
    return record
