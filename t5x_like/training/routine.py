"""The effects that every run has: log, check, evaluate, save."""

import dataclasses
from collections.abc import Callable

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.models.parameters import Params
from t5x_like.reporting.goodput import Goodput
from t5x_like.training.effects import Effect, Run
from t5x_like.training.experiment import Experiment
from t5x_like.training.manifest import manifest_of
from t5x_like.training.recovery import Recovery
from t5x_like.training.replicas import ReplicaCheck
from t5x_like.training.reporter import Reporter, Scores
from t5x_like.training.signals import Requests
from t5x_like.training.state import TrainState
from t5x_like.training.step import LAYER_NORMS, Metrics


@dataclasses.dataclass
class Turn:
    """What the effects of one step tell those behind them.

    Attributes:
      scores: validation metrics of this step; None without an evaluation.
      last: whether training ends here.
    """

    scores: Scores | None = None
    last: bool = False


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
    """Scores the parameters, or their average, on the validation split."""

    experiment: Experiment
    validate: Callable[[Params], Scores]
    reporter: Reporter
    goodput: Goodput
    turn: Turn

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        self.turn.scores = None
        run = self.experiment.run
        if step % run.evaluate_every_steps and step != run.steps:
            return
        self.reporter.flush()
        with self.goodput.during("evaluate"):
            self.turn.scores = self.reporter.attempt("evaluation", self.validate, state.averaged)
        if self.turn.scores is not None:
            self.reporter.validation(step, self.turn.scores)
            self.reporter.restart_clock(step)


@dataclasses.dataclass
class Save(Effect):
    """Saves when it is due, asked for or the last step, after all records up to here; it also tells which is last."""

    run: Run
    checkpoints: Checkpoints
    recovery: Recovery
    requests: Requests
    check: Check
    goodput: Goodput
    turn: Turn

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        reporter, stops = self.check.reporter, self.requests.stop
        last = self.turn.last = finished(self.run, step, reporter) or stops(step)
        if self.requests.save(step) or self.checkpoints.due(step) or last:
            self.check.now(step, state)
            manifest = manifest_of(self.run.job, self.run.data, self.recovery.batch_number(step))
            self.goodput.saved(step)
            with self.goodput.during("save"):
                self.checkpoints.save(step, state, metrics=self.turn.scores, manifest=manifest, force=last)
            reporter.restart_clock(step)


def finished(run: Run, step: int, reporter: Reporter) -> bool:
    """True at the last step, or when early stopping is configured and says so."""
    settings = run.experiment.run
    stopping = settings.early_stopping
    values = [scores[stopping.metric] for scores in reporter.validation_history] if stopping else []
    return step >= settings.steps or (stopping is not None and stopping.exhausted(values))


@dataclasses.dataclass
class Own(Effect):
    """An effect of the user's: what fails there is told and counted, and training goes on."""

    effect: Effect
    reporter: Reporter

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        self.reporter.attempt(type(self.effect).__name__, self.effect.after_step, step, state, metrics)

    def end(self) -> None:
        self.reporter.attempt(type(self.effect).__name__, self.effect.end)
