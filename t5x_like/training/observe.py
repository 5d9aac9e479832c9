"""Effects on request: a trace for xprof, samples of text."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from t5x_like.files import write_atomic
from t5x_like.training.effects import Effect
from t5x_like.training.reporter import Reporter
from t5x_like.training.state import TrainState
from t5x_like.training.step import Metrics

WriteSample = Callable[[TrainState], str]
"""What the model writes."""


class Profile(Effect):
    """Writes a trace of some steps to MODEL_DIR/profile; see LoggingConfig.profile_steps."""

    def __init__(self, steps: tuple[int, int], directory: Path, step: int):
        """Takes the first and the last step, where to write, and the steps already made."""
        self._first, self._last = steps
        self._directory, self._running = directory, False
        self._begin(step)

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(state)
            self.end()
        self._begin(step)

    def end(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("A trace is in %s: xprof --logdir=%s shows it.", self._directory, self._directory)

    def _begin(self, step: int) -> None:
        """Traces from the next step on, if that is among the chosen ones."""
        if not self._running and self._first <= step + 1 <= self._last:
            jax.profiler.start_trace(str(self._directory))
            self._running = True


@dataclasses.dataclass
class Sample(Effect):
    """Writes a sample of text to samples.jsonl and the log; see LoggingConfig.sample_every_steps."""

    every_steps: int
    write: WriteSample
    path: Path
    reporter: Reporter
    start_step: int

    def __post_init__(self):
        """Drops samples of later steps, which a killed run left, and a line cut short."""
        if self.path.exists():
            *lines, _ = self.path.read_text().split("\n")
            kept = (line + "\n" for line in lines if json.loads(line)["step"] <= self.start_step)
            write_atomic(self.path, "".join(kept))

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        if step % self.every_steps == 0:
            with self.reporter.aside(step, "evaluate"):
                self.reporter.attempt("sample", self._append, step, state)

    def _append(self, step: int, state: TrainState) -> None:
        text = self.write(state)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")
        logging.info("Step %d writes:\n%s", step, text)
