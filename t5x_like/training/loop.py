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
on. From log on these are `Effect`s, put in order by `effects_of`.
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
from t5x_like.training.routine import Check, Evaluate, Log, Own, Save, Turn, finished
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


class Requested(NamedTuple):
    """What the command asks of the loop beside the configuration; see `train`."""

    sample: WriteSample | None = None
    debug_nans: bool = False


class Services(NamedTuple):
    """What serves a run from its start to its end, rollbacks included."""

    checkpoints: Checkpoints
    recovery: Recovery
    requests: Requests
    watchdog: Watchdog
    goodput: Goodput

    def alarms(self) -> dict[str, int]:
        """What has gone wrong so far and how often, by name."""
        return {"failed_saves": self.checkpoints.failures, "rollbacks": len(self.recovery.rollbacks)}


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
    settings, run = experiment.run, Run(experiment, job, data, directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(job.placement.use())
        first = jax.process_index() == 0
        # Where the run is on object storage, its records get there with the checkpoint that has passed them.
        push = directory.push if first else lambda: None
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(directory.checkpoints, settings.checkpoints, push))
        )
        requests = Requests(directory.path, checkpoints.overdue, settings.logging.every_steps)
        services = Services(
            checkpoints,
            Recovery(directory.rollbacks, settings.guard),
            stack.enter_context(requests),
            stack.enter_context(Watchdog(settings.guard.hang_minutes)),
            Goodput(directory.goodput, writes=first, seconds_before=seconds_since_process_start()),
        )
        stack.callback(services.goodput.write, ended=True)
        services.watchdog.progress()
        requested = Requested(sample, debug_nans)
        compiled = functools.cache(lambda: compile_together(job))
        while True:
            step, state = starting_state(run, services, allow_changes)
            try:
                return train_from(step, state, run, services, compiled, requested)
            except Fault as fault:
                checkpoints.wait()
                services.recovery.back_to(checkpoints.newest_good(quarantine=True) or 0, fault, data)


def compile_together(job: Job) -> TrainStep:
    """The compiled step, when all processes have it: their first collective operation waits 30 seconds, no longer."""
    step = compile_step(job)
    wait_for_all("compiled")
    return step


def train_from(
    step: int,
    state: TrainState,
    run: Run,
    services: Services,
    compiled: Callable[[], TrainStep],
    requested: Requested,
) -> Outcome:
    """Trains from a state to the end of the run.

    Raises:
      Fault: if training must go back to the newest checkpoint.
    """
    experiment, job, data, _ = run
    settings, goodput = experiment.run, services.goodput
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(
            Reporter(experiment, job, run.directory, start_step=step, goodput=goodput, alarms=services.alarms)
        )
        history = reporter.validation_history
        if finished(run, step, reporter):
            return Outcome(state, f"nothing to do: the run ended at step {step}", history[-1] if history else None)

        with goodput.during("compile"):
            train_step = compiled()
        rows = local_rows(job.batch)
        batch_of = lambda step: data.train.batch(services.recovery.batch_number(step), rows)
        loader = stack.enter_context(Loader(batch_of, step, settings.steps - step))
        turn = Turn()
        effects = effects_of(run, step, services, reporter, turn, requested)
        for effect in effects:
            stack.callback(effect.end)
        reporter.start(step, loader)
        goodput.enter("step")
        for number, batch in device_prefetch(loader, lambda batch: on_devices(batch, job.batch)):
            step = number + 1
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch)
            services.watchdog.progress()
            for effect in effects:
                effect.after_step(step, state, metrics)
            services.watchdog.progress()
            if turn.last:
                break
        complete = finished(run, step, reporter)
    reason = "complete" if step == settings.steps else "stopped early" if complete else "interrupted"
    return Outcome(state, f"{reason} at step {step}", history[-1] if history else None, complete, goodput.describe())


def effects_of(
    run: Run, step: int, services: Services, reporter: Reporter, turn: Turn, requested: Requested
) -> tuple[Effect, ...]:
    """The effects of a run in their order, which is that of this module's head."""
    experiment, job, data, directory = run
    settings, goodput = experiment.run, services.goodput
    logs, guard = settings.logging, settings.guard
    replicas = ReplicaCheck(job.state.params, job.mesh, guard.compare_replicas_every_steps)
    validate = make_validation(job.spec.graphdef, settings.loss, data, job.batch, settings.evaluate_num_batches)
    check = Check(reporter, services.recovery, replicas)
    replay, sample = Replay(run, services.recovery), requested.sample
    effects: list[Effect] = [Log(reporter)]
    if requested.debug_nans:
        effects.append(FindNonFinite(replay, job.spec.axes))
    effects.append(check)
    if logs.profile_steps is not None:
        effects.append(Profile(logs.profile_steps, directory.path / "profile", step))
    effects.append(Evaluate(experiment, validate, reporter, goodput, turn))
    if logs.sample_every_steps and sample is not None:
        path = directory.path / "samples.jsonl"
        effects.append(Sample(logs.sample_every_steps, sample, path, reporter, goodput, step))
    if logs.norms_every_steps:
        effects.append(Norms(logs.norms_every_steps, replay, reporter))
    effects += [Own(effect.build(run, step), reporter) for effect in settings.effects]
    save = Save(run, services.checkpoints, services.recovery, services.requests, check, goodput, turn)
    return (*effects, save)


def starting_state(run: Run, services: Services, allow_changes: Sequence[str]) -> tuple[int, TrainState]:
    """The newest good checkpoint's step and state, or those of a fresh run.

    Raises:
      UserError: if the data is not what the checkpoint was trained on, the model has changed, or all checkpoints are
        damaged.
    """
    job, checkpoints, settings = run.job, services.checkpoints, run.experiment.run
    with services.goodput.during("init"):
        step = checkpoints.newest_good(quarantine=True)
        services.goodput.resumed(step or 0)
        if step is not None:
            manifest = manifest_of(job, run.data, services.recovery.batch_number(step))
            check_manifest(checkpoints.manifest(step), manifest, checkpoints.directory / str(step), allow_changes)
            logging.info("Resuming at step %d.", step)
            return step, checkpoints.restore(job.state, step, layers=job.model.layers)
        state, source = initial_state(job.create_state, job.state), settings.initialize_from
        return 0, state if source is None else with_parameters_of(source, state, job.model.layers)
