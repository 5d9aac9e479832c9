"""The effects that every run has, log, check, evaluate and save, and what holds those of the user."""

import dataclasses
from collections.abc import Callable

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.errors import UserError
from t5x_like.models.parameters import Params
from t5x_like.reporting.goodput import Goodput
from t5x_like.training.effects import Effect, Run
from t5x_like.training.manifest import manifest_of
from t5x_like.training.recovery import Fault, Recovery
from t5x_like.training.replicas import ReplicaCheck
from t5x_like.training.reporter import Reporter, Scores
from t5x_like.training.signals import Requests
from t5x_like.training.state import TrainState
from t5x_like.training.step import LAYER_NORMS, Metrics


@dataclasses.dataclass
class Log(Effect):
    """Hands the metrics to the reporter, which fetches them when the next step is under way."""

    reporter: Reporter

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        self.reporter.advance(step, {name: value for name, value in metrics.items() if name != LAYER_NORMS})


@dataclasses.dataclass
class Check(Effect):
    """Raises Fault if too many steps in a row were skipped, or devices disagree."""

    reporter: Reporter
    recovery: Recovery
    replicas: ReplicaCheck

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        self.recovery.check(*self.reporter.latest)
        self.replicas.after_step(step, state.params)

    def now(self, step: int, state: TrainState) -> None:
        """Waits for the step, its record and all verdicts."""
        self.reporter.flush()
        self.recovery.check(*self.reporter.latest)
        self.replicas.check_now(step, state.params)


@dataclasses.dataclass
class Evaluate(Effect):
    """Scores the parameters, or their average, on the validation split.

    Attributes:
      scores: of this step; None without an evaluation.
    """

    every_steps: int
    num_steps: int
    validate: Callable[[Params], Scores]
    reporter: Reporter
    scores: Scores | None = None

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        self.scores = None
        if step % self.every_steps == 0 or step == self.num_steps:
            with self.reporter.aside(step, "evaluate"):
                self.scores = self.reporter.attempt("evaluation", self.validate, state.averaged)
                if self.scores is not None:
                    self.reporter.validation(step, self.scores)


@dataclasses.dataclass
class Own(Effect):
    """An effect of the user's: what fails there is told and counted, and training goes on.

    It may end the run by a UserError, or send it back by a Fault.
    """

    effect: Effect
    reporter: Reporter

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        name, act = type(self.effect).__name__, self.effect.after_step
        self.reporter.attempt(name, act, step, state, metrics, passing=(Fault, UserError))

    def end(self) -> None:
        self.reporter.attempt(type(self.effect).__name__, self.effect.end)


@dataclasses.dataclass
class Save(Effect):
    """Saves when it is due, asked for or the last step, after all records up to here.

    Attributes:
      last: whether training ends here.
    """

    run: Run
    checkpoints: Checkpoints
    requests: Requests
    goodput: Goodput
    check: Check
    evaluate: Evaluate
    last: bool = False

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        reporter = self.check.reporter
        self.last = finished(self.run, step, reporter) or self.requests.stop(step)
        if self.requests.save(step) or self.checkpoints.due(step) or self.last:
            self.check.now(step, state)
            manifest = manifest_of(self.run.job, self.run.data, self.check.recovery.batch_number(step))
            self.goodput.saved(step)
            with reporter.aside(step, "save"):
                self.checkpoints.save(step, state, metrics=self.evaluate.scores, manifest=manifest, force=self.last)


def finished(run: Run, step: int, reporter: Reporter) -> bool:
    """True at the last step, or when early stopping is configured and says so."""
    settings = run.experiment.run
    stopping = settings.early_stopping
    values = [scores[stopping.metric] for scores in reporter.validation_history] if stopping else []
    return step >= settings.steps or (stopping is not None and stopping.exhausted(values))
