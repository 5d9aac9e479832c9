"""The training loop, which owns all effects.

Every step happens in this order:

    fetch     the batch of this step, already on the devices
    step      the compiled update is dispatched; the host does not wait for it. A bad step changes nothing (`guards`)
    log       every `logging.every_steps`; the values are fetched when the next step is under way
    find      with `train --debug_nans`: the layer where a value became non-finite, and the end of the run
    check     too many steps skipped in a row, or devices that disagree: back to the newest checkpoint (`recovery`)
    profile   the trace of `logging.profile_steps` begins or ends
    evaluate  every `evaluate_every_steps` and at the end, on the validation split
    sample    every `logging.sample_every_steps`
    norms     every `logging.norms_every_steps`, layer by layer
    own       the user's `effects`, in the order of the configuration
    save      every `checkpoints.save_every_steps`, on request (`requests`) and at the end, after all records up to here

So metrics.jsonl never lacks a record that a checkpoint has passed, and a resumed run writes again exactly what came
after that checkpoint. What fails among log, evaluate, sample, norms and own is told and counted, and training goes
on; a user's effect may end the run by a UserError. From log on these are `Effect`s, put in order by `Training`.
"""

import contextlib
import functools
from collections.abc import Sequence
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
from t5x_like.training.effects import Effect, Run
from t5x_like.training.experiment import Experiment
from t5x_like.training.initialize import with_parameters_of
from t5x_like.training.inspect_layers import FindNonFinite, Norms, Replay
from t5x_like.training.job import Job, compile_step
from t5x_like.training.manifest import check_manifest, manifest_of
from t5x_like.training.observe import Profile, Sample, WriteSample
from t5x_like.training.recovery import Fault, Recovery
from t5x_like.training.replicas import ReplicaCheck
from t5x_like.training.reporter import Reporter, Scores
from t5x_like.training.routine import Check, Evaluate, Log, Own, Save, finished
from t5x_like.training.signals import Requests
from t5x_like.training.state import TrainState, initial_state
from t5x_like.training.step import TrainStep
from t5x_like.training.watchdog import Watchdog


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


def train(
    experiment: Experiment,
    job: Job,
    data: Data,
    directory: RunDirectory,
    *,
    allow_changes: Sequence[str] = (),
    sample: WriteSample | None = None,
    debug_nans: bool = False,
) -> Outcome:
    """Trains from the newest good checkpoint in `directory`, or from step 0, to the end of the run.

    Args:
      experiment: the run's configuration.
      job: the experiment on its mesh.
      data: what it trains on.
      directory: MODEL_DIR, its lock held.
      allow_changes: paths in the configuration that may differ from the run that is resumed, e.g. `data`.
      sample: what the model writes; None if it writes no text.
      debug_nans: ends at the first step that is not finite, and says where that comes from.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(job.placement.use())
        training = Training(Run(experiment, job, data, directory), stack, sample, debug_nans)
        while True:
            step, state = training.start(allow_changes)
            try:
                return training.go_on(step, state)
            except Fault as fault:
                checkpoints = training.checkpoints
                checkpoints.wait()
                training.recovery.back_to(checkpoints.newest_good(quarantine=True) or 0, fault, data)


class Training:
    """What serves a run from its start to its end, rollbacks included."""

    def __init__(self, run: Run, stack: contextlib.ExitStack, sample: WriteSample | None, debug_nans: bool):
        """Begins to listen and to watch, until `stack` is left; see `train`."""
        self.run, self.sample, self.debug_nans = run, sample, debug_nans
        settings, directory, first = run.experiment.run, run.directory, jax.process_index() == 0
        # Where the run is on object storage, its records get there with the checkpoint that has passed them.
        push = directory.push if first else lambda: None
        self.checkpoints = Checkpoints(directory.checkpoints, settings.checkpoints, push)
        stack.callback(self.checkpoints.close)
        self.recovery = Recovery(directory.rollbacks, settings.guard)
        requests = Requests(directory.path, self.checkpoints.overdue, settings.logging.every_steps)
        self.requests = stack.enter_context(requests)
        self.watchdog = stack.enter_context(Watchdog(settings.guard.hang_minutes))
        self.goodput = Goodput(directory.goodput, writes=first, seconds_before=seconds_since_process_start())
        stack.callback(self.goodput.write, ended=True)
        self.watchdog.progress()

    def start(self, allow_changes: Sequence[str]) -> tuple[int, TrainState]:
        """The newest good checkpoint's step and state, or those of a fresh run.

        Raises:
          UserError: if the data is not what the checkpoint was trained on, the model has changed, or all checkpoints
            are damaged.
        """
        job, checkpoints = self.run.job, self.checkpoints
        source = self.run.experiment.run.initialize_from
        with self.goodput.during("init"):
            step = checkpoints.newest_good(quarantine=True)
            self.goodput.resumed(step or 0)
            if step is None:
                state = initial_state(job.create_state, job.state)
                return 0, state if source is None else with_parameters_of(source, state, job.model.layers)
            manifest = manifest_of(job, self.run.data, self.recovery.batch_number(step))
            check_manifest(checkpoints.manifest(step), manifest, checkpoints.directory / str(step), allow_changes)
            logging.info("Resuming at step %d.", step)
            return step, checkpoints.restore(job.state, step, layers=job.model.layers)

    def go_on(self, step: int, state: TrainState) -> Outcome:
        """Trains from a state to the end of the run.

        Raises:
          Fault: if training must go back to the newest checkpoint.
        """
        run, goodput = self.run, self.goodput
        with contextlib.ExitStack() as stack:
            reporter = stack.enter_context(Reporter(run, goodput, self.alarms, step))
            history = reporter.validation_history
            if finished(run, step, reporter):
                return Outcome(state, f"nothing to do: the run ended at step {step}", history[-1] if history else None)
            with goodput.during("compile"):
                train_step = self.compiled
            num_steps, rows = run.experiment.run.steps, local_rows(run.job.batch)
            batch_of = lambda step: run.data.train.batch(self.recovery.batch_number(step), rows)
            loader = stack.enter_context(Loader(batch_of, step, num_steps - step))
            effects = self.effects(step, reporter)
            for effect in effects:
                stack.callback(effect.end)
            reporter.start(step, loader)
            goodput.enter("step")
            for number, batch in device_prefetch(loader, lambda batch: on_devices(batch, run.job.batch)):
                step = number + 1
                with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = train_step(state, batch)
                self.watchdog.progress()
                for effect in effects:
                    effect.after_step(step, state, metrics)
                self.watchdog.progress()
                if effects[-1].last:
                    break
            complete = finished(run, step, reporter)
        reason = "complete" if step == num_steps else "stopped early" if complete else "interrupted"
        scores = history[-1] if history else None
        return Outcome(state, f"{reason} at step {step}", scores, complete, goodput.describe())

    @functools.cached_property
    def compiled(self) -> TrainStep:
        """The step, when all processes have it: their first collective operation waits 30 seconds, no longer."""
        step = compile_step(self.run.job)
        wait_for_all("compiled")
        return step

    def alarms(self) -> dict[str, int]:
        """What has gone wrong so far and how often, by name."""
        return {"failed_saves": self.checkpoints.failures, "rollbacks": len(self.recovery.rollbacks)}

    def effects(self, step: int, reporter: Reporter) -> tuple[*tuple[Effect, ...], Save]:
        """The effects from `step` on, in the order that this module's head gives."""
        run, (experiment, job, data, directory) = self.run, self.run
        settings, logs, sample = experiment.run, experiment.run.logging, self.sample
        replay = Replay(run, self.recovery)
        replicas = ReplicaCheck(job.state.params, job.mesh, settings.guard.compare_replicas_every_steps)
        check = Check(reporter, self.recovery, replicas)
        validate = make_validation(job.spec.graphdef, settings.loss, data, job.batch, settings.evaluate_num_batches)
        evaluate = Evaluate(settings.evaluate_every_steps, settings.steps, validate, reporter)
        effects: list[Effect] = [Log(reporter)]
        if self.debug_nans:
            effects.append(FindNonFinite(replay))
        effects.append(check)
        if logs.profile_steps is not None:
            effects.append(Profile(logs.profile_steps, directory.path / "profile", step))
        effects.append(evaluate)
        if logs.sample_every_steps and sample is not None:
            effects.append(Sample(logs.sample_every_steps, sample, directory.path / "samples.jsonl", reporter, step))
        if logs.norms_every_steps:
            effects.append(Norms(logs.norms_every_steps, replay, reporter))
        effects += [Own(effect.build(run, step), reporter) for effect in settings.effects]
        return *effects, Save(run, self.checkpoints, self.requests, self.goodput, check, evaluate)
