"""The training loop, which owns all effects.

Every step happens in this order:

    fetch     the batch of this step, already on the devices
    step      the compiled update is dispatched; the host does not wait for it. A bad step changes nothing (`guards`)
    log       every `logging.every_steps`; the values are fetched when the next step is under way
    check     too many steps skipped in a row, or devices that disagree: back to the newest checkpoint (`recovery`)
    evaluate  every `evaluate_every_steps` and at the end, on the validation split
    save      every `checkpoints.save_every_steps`, on request (`requests`) and at the end, after all records up to here

So metrics.jsonl never lacks a record that a checkpoint has passed, and a resumed run writes again exactly what came
after that checkpoint. What fails among log and evaluate is told and counted, and training goes on.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import logging

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.data.build import Data
from t5x_like.data.loader import Loader, device_prefetch
from t5x_like.evaluation.evaluator import make_validation
from t5x_like.reporting.goodput import Goodput, seconds_since_process_start
from t5x_like.runtime.coordination import wait_for_all
from t5x_like.sharding.logical import local_rows, on_devices
from t5x_like.training.experiment import Experiment
from t5x_like.training.initialize import with_parameters_of
from t5x_like.training.job import Job, compile_step
from t5x_like.training.manifest import check_manifest, manifest_of
from t5x_like.training.recovery import Fault, Recovery
from t5x_like.training.replicas import ReplicaCheck
from t5x_like.training.reporter import Reporter
from t5x_like.training.signals import Requests
from t5x_like.training.state import TrainState, initial_state
from t5x_like.training.step import TrainStep
from t5x_like.training.watchdog import Watchdog

Scores = dict[str, float]


class Outcome(NamedTuple):
    """How training ended.

    Attributes:
      state: the final state, on the devices.
      reason: why it ended, in words.
      scores: the last validation metrics; None if there are none.
      complete: False if the same command would train further.
      time: where the time went, in words.
    """

    state: TrainState
    reason: str
    scores: Scores | None
    complete: bool = True
    time: str = ""


class Run(NamedTuple):
    """What a run has from its start to its end, rollbacks included."""

    experiment: Experiment
    job: Job
    data: Data
    directory: RunDirectory
    checkpoints: Checkpoints
    recovery: Recovery
    requests: Requests
    watchdog: Watchdog
    goodput: Goodput

    def alarms(self) -> dict[str, int]:
        """What has gone wrong so far and how often, by name."""
        return {"failed_saves": self.checkpoints.failures, "rollbacks": len(self.recovery.rollbacks)}


def train(
    experiment: Experiment, job: Job, data: Data, directory: RunDirectory, *, allow_changes: Sequence[str] = ()
) -> Outcome:
    """Trains from the newest good checkpoint in `directory`, or from step 0, to the end of the run.

    Args:
      experiment: the run's configuration.
      job: the experiment on its mesh.
      data: what it trains on.
      directory: MODEL_DIR, its lock held.
      allow_changes: paths in the configuration that may differ from the run that is resumed, e.g. `data`.
    """
    settings = experiment.run
    with contextlib.ExitStack() as stack:
        stack.enter_context(job.placement.use())
        first = jax.process_index() == 0
        # Where the run is on object storage, its records get there with the checkpoint that has passed them.
        push = directory.push if first else lambda: None
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(directory.checkpoints, settings.checkpoints, push))
        )
        requests = Requests(directory.path, checkpoints.overdue, settings.logging.every_steps)
        run = Run(
            experiment,
            job,
            data,
            directory,
            checkpoints,
            Recovery(directory.rollbacks, settings.guard),
            stack.enter_context(requests),
            stack.enter_context(Watchdog(settings.guard.hang_minutes)),
            Goodput(directory.goodput, writes=first, seconds_before=seconds_since_process_start()),
        )
        stack.callback(run.goodput.write, ended=True)
        run.watchdog.progress()
        compiled = functools.cache(lambda: compile_together(job))
        while True:
            step, state = starting_state(run, allow_changes)
            try:
                return train_from(step, state, run, compiled)
            except Fault as fault:
                checkpoints.wait()
                run.recovery.back_to(checkpoints.newest_good(quarantine=True) or 0, fault, data)


def compile_together(job: Job) -> TrainStep:
    """The compiled step, when all processes have it: their first collective operation waits 30 seconds, no longer."""
    step = compile_step(job)
    wait_for_all("compiled")
    return step


def train_from(step: int, state: TrainState, run: Run, compiled: Callable[[], TrainStep]) -> Outcome:
    """Trains from a state to the end of the run.

    Raises:
      Fault: if training must go back to the newest checkpoint.
    """
    experiment, job, data, settings = run.experiment, run.job, run.data, run.experiment.run
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(
            Reporter(experiment, job, run.directory, start_step=step, goodput=run.goodput, alarms=run.alarms)
        )
        history = reporter.validation_history
        if step >= settings.steps or exhausted(experiment, history):
            return Outcome(state, f"nothing to do: the run ended at step {step}", history[-1] if history else None)

        with run.goodput.during("compile"):
            train_step = compiled()
        validate = make_validation(job.spec.graphdef, settings.loss, data, job.batch, settings.evaluate_num_batches)
        replicas = ReplicaCheck(job.state.params, job.mesh, settings.guard.compare_replicas_every_steps)
        rows = local_rows(job.batch)
        batch_of = lambda step: data.train.batch(run.recovery.batch_number(step), rows)
        loader = stack.enter_context(Loader(batch_of, step, settings.steps - step))
        reporter.start(step, loader)
        run.goodput.enter("step")
        for number, batch in device_prefetch(loader, lambda batch: on_devices(batch, job.batch)):
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch)
            step, scores = number + 1, None
            run.watchdog.progress()
            reporter.advance(step, metrics)
            run.recovery.check(*reporter.latest)
            replicas.after_step(step, state.params)
            if step % settings.evaluate_every_steps == 0 or step == settings.steps:
                reporter.flush()
                with run.goodput.during("evaluate"):
                    scores = reporter.attempt("evaluation", validate, state.params if state.ema is None else state.ema)
                if scores is not None:
                    reporter.validation(step, scores)
            last = step == settings.steps or run.requests.stop(step) or exhausted(experiment, history)
            save = run.requests.save(step) or run.checkpoints.due(step) or last
            if save:
                reporter.flush()
                run.recovery.check(*reporter.latest)
                replicas.check_now(step, state.params)
                save_state(run, step, state, scores, force=last)
            if save or scores is not None:
                reporter.restart_clock(step)
                run.watchdog.progress()
            if last:
                break
    complete = step == settings.steps or exhausted(experiment, history)
    reason = "complete" if step == settings.steps else "stopped early" if complete else "interrupted"
    scores = history[-1] if history else None
    return Outcome(state, f"{reason} at step {step}", scores, complete, run.goodput.describe())


def save_state(run: Run, step: int, state: TrainState, scores: Scores | None, *, force: bool) -> None:
    """Starts a save, or with `force` makes it."""
    manifest = manifest_of(run.job, run.data, run.recovery.batch_number(step))
    run.goodput.saved(step)
    with run.goodput.during("save"):
        run.checkpoints.save(step, state, metrics=scores, manifest=manifest, force=force)


def starting_state(run: Run, allow_changes: Sequence[str]) -> tuple[int, TrainState]:
    """The newest good checkpoint's step and state, or those of a fresh run.

    Raises:
      UserError: if the data is not what the checkpoint was trained on, the model has changed, or all checkpoints are
        damaged.
    """
    job, checkpoints, settings = run.job, run.checkpoints, run.experiment.run
    with run.goodput.during("init"):
        step = checkpoints.newest_good(quarantine=True)
        run.goodput.resumed(step or 0)
        if step is not None:
            manifest = manifest_of(job, run.data, run.recovery.batch_number(step))
            check_manifest(checkpoints.manifest(step), manifest, checkpoints.directory / str(step), allow_changes)
            logging.info("Resuming at step %d.", step)
            return step, checkpoints.restore(job.state, step)
        state = initial_state(job.create_state, job.state)
        return 0, state if settings.initialize_from is None else with_parameters_of(settings.initialize_from, state)


def exhausted(experiment: Experiment, history: list[Scores]) -> bool:
    """True when early stopping is configured and says so."""
    stopping = experiment.run.early_stopping
    return stopping is not None and stopping.exhausted([scores[stopping.metric] for scores in history])
