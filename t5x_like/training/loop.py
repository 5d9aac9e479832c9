"""The training loop, which owns all effects.

Every step happens in this order:

    fetch     the batch of this step, already on the devices
    step      the compiled update is dispatched; the host does not wait for it
    log       every `logging.every_steps`; the values are fetched when the next step is under way
    evaluate  every `evaluate_every_steps` and at the end, on the validation split
    save      every `checkpoints.save_every_steps` and at the end, after all records up to here are written

So metrics.jsonl never lacks a record that a checkpoint has passed, and a resumed run writes again exactly what came
after that checkpoint.
"""

import contextlib
import signal
import threading
from typing import Any, NamedTuple, Self

import jax
from absl import logging

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.data.build import Data
from t5x_like.data.loader import Loader, device_prefetch
from t5x_like.errors import UserError
from t5x_like.evaluation.evaluator import make_validation
from t5x_like.sharding.logical import on_devices
from t5x_like.sharding.mesh import choices_of
from t5x_like.training.experiment import Experiment
from t5x_like.training.reporting import Reporter
from t5x_like.training.setup import Job, compile_step
from t5x_like.training.state import TrainState, initial_state

Scores = dict[str, float]


class Outcome(NamedTuple):
    """How training ended.

    Attributes:
      state: the final state, on the devices.
      reason: why it ended, in words.
      scores: the last validation metrics; None if there are none.
      complete: False if the same command would train further.
    """

    state: TrainState
    reason: str
    scores: Scores | None
    complete: bool = True


def train(experiment: Experiment, job: Job, data: Data, directory: RunDirectory) -> Outcome:
    """Trains from the newest checkpoint in `directory`, or from step 0, to the end of the run."""
    run = experiment.run
    manifest = {
        "data": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint(),
        "vocab_size": job.model.vocab_size,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(job.mesh))
        stack.enter_context(choices_of(experiment.mesh))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(directory.checkpoints, run.checkpoints)))
        step, state = starting_state(job, checkpoints, manifest)
        reporter = stack.enter_context(Reporter(experiment, job, directory, start_step=step))
        history = reporter.validation_history
        if step >= run.steps or exhausted(experiment, history):
            return Outcome(state, f"nothing to do: the run ended at step {step}", history[-1] if history else None)

        train_step = compile_step(job)
        validate = make_validation(job.spec.graphdef, run.loss, data, job.batch, run.evaluate_num_batches)
        stop = stack.enter_context(StopSignal())
        loader = stack.enter_context(Loader(data.train.batch, step, run.steps - step))
        reporter.start(step, loader)
        for number, batch in device_prefetch(loader, lambda batch: on_devices(batch, job.batch)):
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch)
            step, scores = number + 1, None
            reporter.advance(step, metrics)
            if step % run.evaluate_every_steps == 0 or step == run.steps:
                reporter.flush()
                scores = validate(state.params if state.ema is None else state.ema)
                reporter.validation(step, scores)
            last = step == run.steps or stop.requested or exhausted(experiment, history)
            due = last or step % run.checkpoints.save_every_steps == 0
            if due:
                reporter.flush()
                checkpoints.save(step, state, metrics=scores, manifest=manifest, force=last)
            if due or scores is not None:
                reporter.restart_clock(step)
            if last:
                break
    complete = step == run.steps or exhausted(experiment, history)
    reason = "complete" if step == run.steps else "stopped early" if complete else "interrupted"
    return Outcome(state, f"{reason} at step {step}", history[-1] if history else None, complete)


def starting_state(job: Job, checkpoints: Checkpoints, manifest: dict[str, Any]) -> tuple[int, TrainState]:
    """The newest checkpoint's step and state, or those of a fresh run.

    Raises:
      UserError: if the data is not what the checkpoint was trained on, or the model has changed.
    """
    step = checkpoints.latest_step()
    if step is None:
        return 0, initial_state(job.create_state, job.state)
    saved = checkpoints.manifest(step)
    if saved != manifest:
        raise UserError(
            f"The data has changed since step {step} of {checkpoints.directory}: the text, its tokenizer or the layout "
            "of batches is another. Bring back what it was, or start a new run with another MODEL_DIR."
        )
    logging.info("Resuming at step %d.", step)
    return step, checkpoints.restore(job.state, step)


def exhausted(experiment: Experiment, history: list[Scores]) -> bool:
    """True when early stopping is configured and says so."""
    stopping = experiment.run.early_stopping
    return stopping is not None and stopping.exhausted([scores[stopping.metric] for scores in history])


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second one acts at once."""

    def __init__(self):
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may handle signals; a training in another one is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, self._former[number])
        logging.warning("%s: saving and stopping after this step.", signal.Signals(number).name)
