"""What a run tells: metrics, progress bar, loss curve. Only here does the loop fetch values from the devices."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import jax
from absl import logging

from t5x_like.data.loader import Loader
from t5x_like.reporting.goodput import Goodput
from t5x_like.reporting.metrics import MetricsWriter, NoMetricsWriter, open_side_writers, read_metrics
from t5x_like.reporting.plots import plot_losses
from t5x_like.reporting.progress import Progress
from t5x_like.training.effects import Run
from t5x_like.training.experiment import Experiment
from t5x_like.training.flops import model_flops_utilization, peak_flops_per_second
from t5x_like.training.step import Metrics

T = TypeVar("T")

Scores = dict[str, float]
"""Validation metrics."""


class Reporter:
    """Writes records of training and validation; a context manager.

    The record of a logged step is fetched when the next step has been dispatched, so that devices never wait for it.

    Attributes:
      validation_history: values of every validation metric so far, oldest first, those before a resume included.
      latest: step and metrics of the last record fetched.
    """

    def __init__(self, run: Run, goodput: Goodput, alarms: Callable[[], Mapping[str, int]], start_step: int):
        """Opens the files and drops records of steps after `start_step`, which a killed run left.

        Args:
          run: its facts.
          goodput: the account of time; written with the records.
          alarms: what has gone wrong so far and how often, by name; shown and recorded beside the metrics.
          start_step: updates already made.
        """
        settings, self._directory = run.experiment.run, run.directory
        self._every_steps, self._num_steps = settings.logging.every_steps, settings.steps
        self._tokens_per_step, self._flops_per_token = run.job.tokens_per_step, run.job.flops_per_token
        self._peak = peak_flops_per_second(jax.devices()[0])
        # Process 0 writes and shows; all fetch the same values, and decide alike.
        self._first = jax.process_index() == 0
        metrics, shown = self._directory.metrics, settings.logging.progress and self._first
        records = read_metrics(metrics) if metrics.exists() else []
        self.validation_history = [r for r in records if r["split"] == "validation" and 0 < r["step"] <= start_step]
        self._writer = self._open_writer(run.experiment, start_step) if self._first else NoMetricsWriter()
        self._progress = Progress(settings.steps, start_step=start_step, enabled=shown)
        self._goodput, self._alarms = goodput, alarms
        self._failed_attempts: dict[str, int] = {}
        self.latest: tuple[int, dict[str, float]] = (start_step, {})
        self._painter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loss.png")
        self._painting: Future[None] | None = None
        self._loader: Loader | None = None
        self._pending: tuple[int, Metrics] | None = None

    def _open_writer(self, experiment: Experiment, start_step: int) -> MetricsWriter:
        logs = experiment.run.logging
        side_writers = open_side_writers(
            self._directory.path,
            resumed_step=start_step,
            tensorboard=logs.tensorboard,
            wandb_project=logs.wandb_project,
            config=dataclasses.asdict(experiment),
        )
        return MetricsWriter(self._directory.path, resumed_step=start_step, side_writers=side_writers)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.__exit__(*exception)
        self._writer.close()
        if self._first:
            self._paint()
        self._painter.shutdown()

    def start(self, step: int, loader: Loader) -> None:
        """Sets the clock: training goes on after `step`."""
        self._loader = loader
        self._restart_clock(step)

    def advance(self, step: int, metrics: Metrics) -> None:
        """Tells that `step` has been dispatched and will give `metrics`."""
        self.flush()
        self._progress.advance(step)
        if step % self._every_steps == 0 or step == self._num_steps:
            self._pending = (step, metrics)

    def flush(self) -> None:
        """Fetches and writes the record that is due, if any."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, waited = time.perf_counter(), self._loader.seconds_waited
        seconds = now - self._clock
        seconds_per_step = seconds / (step - self._clock_step)
        tokens_per_second = self._tokens_per_step / seconds_per_step
        waiting = (waited - self._waited) / seconds
        self._clock, self._clock_step, self._waited = now, step, waited
        values |= {
            "seconds_per_step": seconds_per_step,
            "tokens_per_second": tokens_per_second,
            "waiting_for_data": waiting,
        }
        mfu = model_flops_utilization(tokens_per_second, self._flops_per_token, jax.device_count(), self._peak)
        if mfu is not None:
            values["mfu"] = mfu
        alarms = self.alarms()
        self.latest = step, values
        self._writer.write(step, "train", values | {name: count for name, count in alarms.items() if count})
        self._progress.report(
            step,
            loss=values["loss"],
            tokens_per_second=tokens_per_second,
            mfu=mfu,
            waiting=waiting,
            alarms=alarms | {"skipped_steps": int(values["skipped"])},
        )
        self._goodput.waited(waited)
        self._goodput.write()

    def alarms(self) -> dict[str, int]:
        """What has gone wrong so far and how often, by name."""
        return {**self._alarms(), "failed_metrics": self._writer.failures, **self._failed_attempts}

    def attempt(
        self, name: str, call: Callable[..., T], *args: Any, passing: tuple[type[Exception], ...] = ()
    ) -> T | None:
        """The result of what must not stop training; None if it fails, which is logged and counted.

        Errors of the types in `passing` are raised.
        """
        try:
            return call(*args)
        except passing:
            raise
        except Exception as error:
            self._failed_attempts[f"failed_{name}s"] = self._failed_attempts.get(f"failed_{name}s", 0) + 1
            logging.exception("The %s failed; training goes on: %r", name, error)
            return None

    def validation(self, step: int, scores: dict[str, float]) -> None:
        """Writes validation metrics and redraws the curves in the background."""
        self._writer.write(step, "validation", scores)
        self.validation_history.append({"step": step, "split": "validation", **scores})
        self._progress.report(step, validation_loss=scores["loss"])
        if self._first and (self._painting is None or self._painting.done()):
            self._painting = self._painter.submit(self._paint)

    def norms(self, step: int, values: Mapping[str, float]) -> None:
        """Writes norms of layers."""
        self._writer.write(step, "norms", values)

    @contextlib.contextmanager
    def aside(self, step: int, cause: str) -> Iterator[None]:
        """Writes the record that is due, then takes the time within, after `step`, out of the speed shown."""
        self.flush()
        with self._goodput.during(cause):
            yield
        self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        self._clock, self._clock_step, self._waited = time.perf_counter(), step, self._loader.seconds_waited

    def _paint(self) -> None:
        self.attempt("picture", plot_losses, self._directory.metrics, self._directory.loss_plot)
