"""Checkpoints of a run: saved in the background, whole or not at all, verified, restored on any mesh.

A checkpoint is a directory STEP, written by Orbax: the state's arrays as a nested dict under `state/`, and a JSON
record (metrics, manifest) that is committed with them. The list of checkpoints is always read from disk:
    STEP/checksums-0-of-1.json  a complete one (with several processes: a file of each); see `integrity`
    STEP                        without them: killed at the very end of a save, or while it was being deleted
    STEP.orbax-checkpoint-tmp   one being written; renamed to STEP when complete
    STEP.damaged                one that failed verification, for a person to look at; the newest of them stays
Whatever kills the process, the list holds only complete checkpoints, and the next save sweeps the leftovers.
"""

import itertools
import logging as standard_logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from t5x_like.checkpoints.integrity import damage, is_complete, remove_checksums, write_checksums
from t5x_like.checkpoints.layers import Layers, Name, Shapes, by_name, moved, relaid, relay, sources
from t5x_like.checkpoints.orbax import no_orbax_chatter, orbax_options, snapshot, with_sharding
from t5x_like.checkpoints.policy import CheckpointConfig, Record
from t5x_like.errors import UserError
from t5x_like.files import is_remote
from t5x_like.runtime.coordination import wait_for_all

TEMPORARY = ".orbax-checkpoint-tmp"
DAMAGED = ".damaged"

_numbers = itertools.count()
"""Names for what all processes wait for; they make the same calls, so they count alike."""


class Checkpoints:
    """The checkpoints in one directory, local or `gs://`.

    Reading changes nothing on disk, so evaluation may read what a running training writes. Only the holder of the run
    directory's lock may save and quarantine. In a run of several processes, each makes the same calls.

    Attributes:
      directory: where the checkpoints are.
      failures: number of saves that failed since the last one that succeeded.
      seconds_checking: time that the last save or verification spent on checksums.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig,
        before_completion: Callable[[], None] = lambda: None,
    ):
        """Takes what to do, in the background, before a checkpoint counts as complete; raising fails the save."""
        # Orbax takes no relative paths.
        directory = os.fspath(directory)
        self.directory = epath.Path(directory if is_remote(directory) else os.path.abspath(directory))
        self.config = config
        self._before_completion = before_completion
        self.failures = 0
        self.seconds_checking = 0.0
        self._error = ""
        self._saved_at = time.monotonic()
        self._saving: Future[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        standard_logging.getLogger("absl").addFilter(no_orbax_chatter)

    # Reading

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self._directories() if is_complete(self._path(step))]

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best value of the configured metric; None if none has one."""
        return next(iter(self.config.ranked(self._records())), None)

    def manifest(self, step: int | None = None) -> dict[str, Any]:
        """The manifest given to `save`, of the newest step unless told otherwise."""
        return self._record(self._existing(step))["manifest"]

    def metrics(self, step: int | None = None) -> dict[str, float]:
        """The metrics given to `save`, of the newest step unless told otherwise."""
        return self._record(self._existing(step))["metrics"]

    def arrays(self, step: int | None = None) -> dict[Name, jax.ShapeDtypeStruct]:
        """Shape and dtype of every saved array by name, e.g. ("params", "decoder", ...), without reading values."""
        path = self._path(self._existing(step))
        try:
            saved = ocp.metadata(path).metadata
            return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in by_name(saved).items()}
        except Exception as error:  # Orbax raises what its parsers raise.
            raise UserError(f"Checkpoint {path} cannot be read, it is damaged or not from here: {error!r}.") from error

    def verify(self, step: int) -> list[str]:
        """Compares every file of a checkpoint with its checksum, the processes sharing the work.

        Returns:
          What is wrong, a line each; empty if nothing is.
        """
        start = time.perf_counter()
        try:
            problems = damage(self._path(step), jax.process_index(), jax.process_count())
        except OSError as error:
            problems = [f"it cannot be read: {error}"]
        self.seconds_checking = time.perf_counter() - start
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(np.int32(len(problems)))
            problems = problems or [f"process {index} found damage" for index in np.flatnonzero(found)]
        return problems

    def check(self, step: int) -> int:
        """Returns the step if its checkpoint is whole.

        Raises:
          UserError: if there is none, or it is damaged.
        """
        if problems := self.verify(self._existing(step)):
            raise UserError(f"Checkpoint {self._path(step)} is damaged: {_listed(problems)}. Choose another step.")
        return step

    def newest_good(self, *, quarantine: bool = False) -> int | None:
        """The newest checkpoint that is whole; None if there never was one.

        Args:
          quarantine: renames damaged checkpoints on the way to STEP.damaged; only for the holder of the lock.

        Raises:
          UserError: if there are checkpoints but all are damaged.
        """
        damaged = []
        for step in reversed(self._directories()):
            complete = is_complete(self._path(step))
            if not complete and not quarantine:
                continue  # To a reader, it may be one that is just being finished.
            problems = self.verify(step) if complete else ["it is incomplete (a kill at the end of a save leaves this)"]
            if not problems:
                logging.info("Checkpoint %d is whole (verified in %.2f s).", step, self.seconds_checking)
                return step
            if complete:
                damaged.append(step)
            self._report_damage(step, problems, quarantine)
        if damaged:
            raise UserError(
                f"All checkpoints in {self.directory} are damaged ({', '.join(map(str, damaged))}): bring back a copy "
                "of one of them, or start a new run with another MODEL_DIR."
            )
        return None

    def restore(
        self,
        abstract_state: PyTree,
        step: int | None = None,
        *,
        partial: bool = False,
        layers: Layers | None = None,
    ) -> PyTree:
        """Reads a checkpoint into the structure and shardings asked for, whatever mesh it was saved on.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct`; a leaf without sharding goes to the first local device.
          step: which checkpoint, known to be whole (see `newest_good`, `verify`); None: the newest that is.
          partial: the tree may be a part of what was saved, e.g. `{"params": ...}`.
          layers: at which places the tree has them; the checkpoint may have them at others, which its manifest lists.

        Returns:
          The tree with arrays equal to the saved ones bit for bit.

        Raises:
          UserError: if there is no such checkpoint, or names, shapes or dtypes differ (nothing is read then).
        """
        step = self._existing(self.newest_good() if step is None else step)
        places = moved(self.manifest(step).get("layers", {}), layers) if layers else ({}, {})
        saved = self.arrays(step)
        target = {name: with_sharding(leaf) for name, leaf in by_name(abstract_state).items()}
        self._check_fits(step, jax.eval_shape(lambda arrays: relaid(arrays, *places), saved), target, partial)
        placed = sources(saved, target, *places)
        with orbax_options():
            restored = by_name(ocp.load(self._path(step), traverse_util.unflatten_dict(placed)))
        restored = relay(restored, target, *places)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in target])

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _directories(self) -> list[int]:
        """Steps of which there is anything under the final name, ascending."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"There is no checkpoint in {self.directory}: train first, or correct MODEL_DIR.")
        if step is not None and step not in steps:
            listed = ", ".join(map(str, steps))
            raise UserError(f"There is no checkpoint of step {step} in {self.directory}: choose one of {listed}.")
        return steps[-1] if step is None else step

    def _record(self, step: int) -> Record:
        try:
            record = ocp.metadata(self._path(step)).custom_metadata
            if not isinstance(record["manifest"], dict) or not isinstance(record.get("time", 0.0), float):
                raise TypeError("its record is of another form")
            return record | {"metrics": {name: float(value) for name, value in record["metrics"].items()}}
        except Exception as error:  # Orbax raises what its parsers raise.
            raise UserError(
                f"The record of checkpoint {self._path(step)} cannot be read, is damaged or not from here: {error!r}."
            ) from error

    def _records(self) -> dict[int, Record]:
        records = {}
        for step in self.steps():
            try:
                records[step] = self._record(step)
            except UserError as error:
                # It has no rank, but it stays while it is among the newest.
                logging.warning("%s", error)
                records[step] = {"metrics": {}, "manifest": {}}
        return records

    def _report_damage(self, step: int, problems: list[str], quarantine: bool) -> None:
        place = self.directory / f"{step}{DAMAGED}"
        kept = f" It is kept as {place}." if quarantine else ""
        logging.warning("Checkpoint %d is damaged and not used: %s.%s", step, _listed(problems), kept)
        if quarantine and jax.process_index() == 0:
            if place.exists():
                place.rmtree()
            self._path(step).rename(place)
        if quarantine:
            wait_for_all(f"quarantined/{next(_numbers)}")

    def _check_fits(self, step: int, saved: Shapes, target: Shapes, partial: bool) -> None:
        names = target if partial else {**target, **saved}
        kinds = [(name, _kind(saved.get(name)), _kind(target.get(name))) for name in names]
        differences = [f"  {'/'.join(name)}: saved {old}, needed {new}" for name, old, new in kinds if old != new]
        if differences:
            more = [f"  ... and {len(differences) - 5} more"] if len(differences) > 5 else []
            raise UserError(
                "\n".join([f"Checkpoint {self._path(step)} does not fit this model:", *differences[:5], *more])
                + "\nUse the configuration it was trained with (operative_config.gin beside it), or another MODEL_DIR."
            )

    # Writing

    def due(self, step: int) -> bool:
        """True if the schedule of steps says so; that of minutes is `overdue`."""
        return step % self.config.save_every_steps == 0

    def overdue(self) -> bool:
        """True if the last save is older than `save_every_minutes`, in this process."""
        minutes = self.config.save_every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: dict[str, float] | None = None,
        manifest: dict[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        """Saves the state, and keeps only the checkpoints that the configuration names.

        Waits for a save still running, takes a snapshot of the state and returns: the next step may donate its buffers.
        A save that fails (disk full, ...) is logged and counted in `failures`; older checkpoints are untouched, what it
        left is removed, and the next save is made afresh. A step that is already saved is left as it is.

        Args:
          step: number of finished optimizer steps.
          state: tree of `jax.Array`.
          metrics: validation metrics at this step, for `keep_best`.
          manifest: JSON-able facts to keep with the state, e.g. fingerprints of configuration and data; `layers`, if
            there, is `Layers` (see `restore`).
          force: returns when it is on disk.

        Raises:
          UserError: with `force` only, if the state could not be saved.
        """
        self.wait()
        self._saved_at = time.monotonic()
        if step not in self.steps():
            values = {name: float(value) for name, value in (metrics or {}).items()}
            self._start(step, state, {"metrics": values, "manifest": manifest or {}, "time": time.time()})
        if force or not self.config.asynchronous:
            self.wait()
        if force and step not in self.steps():
            latest = self.latest_step()
            resume = "from the start" if latest is None else f"from step {latest}, whose checkpoint is intact"
            raise UserError(
                f"Step {step} could not be saved in {self.directory}: {self._error}. Make room there (or the directory "
                f"writable) and give the same command again: it continues {resume}."
            )

    def wait(self) -> None:
        """Returns when no save is running."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        """Waits for a running save and ends the background thread."""
        self.wait()
        self._executor.shutdown()

    def _start(self, step: int, state: PyTree, record: Record) -> None:
        """Takes a snapshot of the state and starts writing it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._check_space(state)
            with orbax_options():
                # Overwrites: on gs://, where nothing is renamed, the leftovers of a killed save have the final name.
                # Nobody donates the buffers of a state whose save is waited for.
                written = snapshot(state) if self.config.asynchronous else state
                tree = traverse_util.unflatten_dict(by_name(written))
                response = ocp.save_async(self._path(step), tree, custom_metadata=record, overwrite=True)
        except Exception as error:  # Storage drivers raise what they like; training must outlive all of it.
            self._failed(step, error)
        else:
            self._saving = self._executor.submit(self._finish, step, response, next(_numbers))

    def _finish(self, step: int, response: ocp.AsyncResponse[None], number: int) -> None:
        """Runs in the background: waits for the write, marks it complete, then deletes what need not stay."""
        try:
            response.result()
            self._before_completion()
            start = time.perf_counter()
            write_checksums(self._path(step), jax.process_index(), jax.process_count())
            self.seconds_checking = time.perf_counter() - start
            wait_for_all(f"saved/{number}")
        except Exception as error:
            self._failed(step, error)
        else:
            self.failures = 0
            self._prune()

    def _failed(self, step: int, error: Exception) -> None:
        self.failures += 1
        self._error = str(error).splitlines()[0] if str(error) else type(error).__name__
        logging.warning(
            "Step %d could not be saved: %s. Training goes on and will try the next save (failures in a row: %d).",
            step,
            self._error,
            self.failures,
        )
        self._sweep()

    def _check_space(self, state: PyTree) -> None:
        # Several processes must decide alike, so one of them may not stay away from a save.
        if is_remote(self.directory) or jax.process_count() > 1:
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if needed > shutil.disk_usage(self.directory).free:
            self._sweep(keep_damaged=0)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise OSError(f"it needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB free")

    def _prune(self) -> None:
        if jax.process_index() == 0:
            records = self._records()
            self._sweep(set(records) - self.config.kept(records))

    def _sweep(self, dropped: Iterable[int] = (), keep_damaged: int = 1) -> None:
        """Deletes these steps, and what killed or failed saves and deletions left; only while no save is running."""
        if jax.process_index() != 0:
            return
        try:
            for step in dropped:
                remove_checksums(self._path(step))
            damaged = sorted(self.directory.glob(f"[0-9]*{DAMAGED}"), key=lambda path: int(path.stem))
            leftovers = list(self.directory.glob(f"*{TEMPORARY}*"))
            leftovers += [self._path(step) for step in self._directories() if not is_complete(self._path(step))]
            for path in [*leftovers, *damaged[: len(damaged) - keep_damaged]]:
                path.rmtree()
        except OSError as error:
            logging.warning("Old files in %s could not be deleted: %s.", self.directory, error)


def _listed(problems: list[str]) -> str:
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def _kind(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype.name}{list(leaf.shape)}"
