"""Checkpoints of a run: saved in the background, whole or not at all, restored on any mesh.

A checkpoint is a directory STEP, written by Orbax: the state's arrays as a nested dict under `state/`, and a JSON
record (metrics, manifest) that is committed with them. The list of checkpoints is always read from disk:
    STEP/commit_success.txt     a complete one
    STEP.orbax-checkpoint-tmp   one being written; renamed to STEP when complete
    STEP.deleted                one being deleted
Whatever kills the process, the list holds only complete checkpoints, and the next save sweeps the leftovers.
"""

import logging as standard_logging
import math
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
from absl import logging
from etils import epath
from flax import traverse_util
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from t5x_like.configurable import configurable
from t5x_like.errors import UserError

Name = tuple[str, ...]

COMMITTED = "commit_success.txt"
TEMPORARY = ".orbax-checkpoint-tmp"
DELETED = ".deleted"


@configurable
class CheckpointConfig:
    """When the state is saved, and which checkpoints stay.

    Attributes:
      save_every_steps: steps between checkpoints; the last step of a run is saved as well.
      keep_last: number of newest checkpoints that stay.
      keep_best: number of checkpoints that stay for their `best_metric`, beside the newest ones; 0: none.
      best_metric: validation metric that ranks checkpoints; one saved at a step without evaluation has no rank.
      best_mode: whether the lowest (min) or the highest (max) value is best.
      asynchronous: writes in the background, from a snapshot of the state in host memory; else training waits.
    """

    save_every_steps: int = 1000
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    asynchronous: bool = True

    def __post_init__(self):
        for name, least in (("save_every_steps", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise UserError(f"CheckpointConfig.{name} is {getattr(self, name)}: it must be at least {least}.")


class Checkpoints:
    """The checkpoints in one directory, local or `gs://`.

    Reading changes nothing on disk, so evaluation may read what a running training writes. Only the holder of the run
    directory's lock may save. In a run of several processes, each makes the same calls.

    Attributes:
      directory: where the checkpoints are.
      failures: number of saves that failed since the last one that succeeded.
    """

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig):
        # Orbax takes no relative paths.
        directory = os.fspath(directory)
        self.directory = epath.Path(directory if "://" in directory else os.path.abspath(directory))
        self.config = config
        self.failures = 0
        self._error = ""
        self._saving: Future[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        standard_logging.getLogger("absl").addFilter(_no_orbax_chatter)

    # Reading

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [path.parent.name for path in self.directory.glob(f"*/{COMMITTED}")]
        return sorted(int(name) for name in names if name.isdecimal())

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best value of the configured metric; None if none has one."""
        return next(iter(self._ranked()), None)

    def manifest(self, step: int | None = None) -> dict[str, Any]:
        """The manifest given to `save`, of the newest step unless told otherwise."""
        return self._record(self._existing(step))["manifest"]

    def metrics(self, step: int | None = None) -> dict[str, float]:
        """The metrics given to `save`, of the newest step unless told otherwise."""
        return self._record(self._existing(step))["metrics"]

    def arrays(self, step: int | None = None) -> dict[Name, jax.ShapeDtypeStruct]:
        """Shape and dtype of every saved array by name, e.g. ("params", "decoder", ...), without reading values."""
        saved = ocp.metadata(self._path(self._existing(step))).metadata
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _by_name(saved).items()}

    def restore(self, abstract_state: PyTree, step: int | None = None, *, partial: bool = False) -> PyTree:
        """Reads a checkpoint into the structure and shardings asked for, whatever mesh it was saved on.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct`; a leaf without sharding goes to the first local device.
          step: which checkpoint; None: the newest.
          partial: the tree may be a part of what was saved, e.g. `{"params": ...}`.

        Returns:
          The tree with arrays equal to the saved ones bit for bit.

        Raises:
          UserError: if there is no such checkpoint, or names, shapes or dtypes differ (nothing is read then).
        """
        step = self._existing(step)
        target = _by_name(abstract_state)
        self._check_fits(step, target, partial)
        placed = {name: _with_sharding(leaf) for name, leaf in target.items()}
        with _orbax_options():
            restored = _by_name(ocp.load(self._path(step), traverse_util.unflatten_dict(placed)))
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in target])

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"There is no checkpoint in {self.directory}: train first, or correct MODEL_DIR.")
        if step is not None and step not in steps:
            listed = ", ".join(map(str, steps))
            raise UserError(f"There is no checkpoint of step {step} in {self.directory}: choose one of {listed}.")
        return steps[-1] if step is None else step

    def _record(self, step: int) -> dict[str, Any]:
        return ocp.metadata(self._path(step)).custom_metadata

    def _ranked(self) -> list[int]:
        """Steps that have the configured metric, best first; of equals the newest."""
        values = {step: self._record(step)["metrics"].get(self.config.best_metric, math.nan) for step in self.steps()}
        sign = 1 if self.config.best_mode == "min" else -1
        finite = [step for step, value in values.items() if math.isfinite(value)]
        return sorted(finite, key=lambda step: (sign * values[step], -step))

    def _check_fits(self, step: int, target: dict[Name, jax.ShapeDtypeStruct], partial: bool) -> None:
        saved = self.arrays(step)
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

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: dict[str, float] | None = None,
        manifest: dict[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        """Saves the state if this step is due, and keeps only the checkpoints that the configuration names.

        Waits for a save still running, takes a snapshot of the state and returns: the next step may donate its buffers.
        A save that fails (disk full, ...) is logged and counted in `failures`; older checkpoints are untouched. A step
        that is already saved is left as it is.

        Args:
          step: number of finished optimizer steps.
          state: tree of `jax.Array`.
          metrics: validation metrics at this step, for `keep_best`.
          manifest: JSON-able facts to keep with the state, e.g. fingerprints of configuration and data.
          force: saves whether due or not, and returns when it is on disk.

        Raises:
          UserError: with `force` only, if the state could not be saved.
        """
        if not force and step % self.config.save_every_steps:
            return
        self.wait()
        if step not in self.steps():
            values = {name: float(value) for name, value in (metrics or {}).items()}
            self._start(step, state, {"metrics": values, "manifest": manifest or {}})
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

    def _start(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Takes a snapshot of the state and starts writing it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._check_space(state)
            with _orbax_options():
                # Overwrites: on gs://, where nothing is renamed, the leftovers of a killed save have the final name.
                # Nobody donates the buffers of a state whose save is waited for.
                written = _snapshot(state) if self.config.asynchronous else state
                tree = traverse_util.unflatten_dict(_by_name(written))
                response = ocp.save_async(self._path(step), tree, custom_metadata=record, overwrite=True)
        except OSError as error:
            self._failed(step, error)
        else:
            self._saving = self._executor.submit(self._finish, step, response)

    def _finish(self, step: int, response: ocp.AsyncResponse[None]) -> None:
        """Runs in the background: waits for the write, then deletes what need not stay."""
        try:
            response.result()
        except Exception as error:  # Storage drivers raise what they like; training must outlive all of it.
            self._failed(step, error)
        else:
            self.failures = 0
            if jax.process_index() == 0:
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
        if "://" in str(self.directory) or jax.process_count() > 1:
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise OSError(f"it needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB free")

    def _prune(self) -> None:
        steps = self.steps()
        kept = steps[-self.config.keep_last :]
        if self.config.keep_best:
            kept += self._ranked()[: self.config.keep_best]
        self._sweep(set(steps) - set(kept))

    def _sweep(self, dropped: Iterable[int] = ()) -> None:
        """Deletes these steps, and what killed or failed saves and deletions left; only while no save is running."""
        if jax.process_index() != 0:
            return
        try:
            for step in dropped:
                # Renamed first: a kill in mid-deletion must not leave half a checkpoint in the list.
                self._path(step).rename(self.directory / f"{step}{DELETED}")
            for pattern in (f"*{TEMPORARY}*", f"*{DELETED}"):
                for path in self.directory.glob(pattern):
                    path.rmtree()
        except OSError as error:
            logging.warning("Old files in %s could not be deleted: %s.", self.directory, error)


def _by_name(tree: PyTree) -> dict[Name, Any]:
    """Leaves by their path in the tree, in the tree's order; tuples and classes name theirs like dicts do."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def _kind(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype.name}{list(leaf.shape)}"


def _snapshot(state: PyTree) -> PyTree:
    """Arrays that may be written at leisure, whatever the next step does with the state's buffers."""
    if jax.default_backend() != "cpu":
        return state  # Orbax copies them to host memory before it returns.
    # On CPU it writes from the buffers themselves: a step that donates them would wait until they are written.
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state)


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without one, Orbax would ask for the devices that the checkpoint was saved from.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _orbax_options() -> ocp.Context:
    options = ocp.Context()
    # Weights hardly compress (8 %), at twice the processor time per save.
    options.array.saving.use_compression = False
    # Orbax's threads wait for a directory that the background cannot make: the process would hang at exit.
    options.asynchronous.create_directories_asynchronously = False
    # What was asked for has been compared with what was saved by name before.
    options.pytree.loading.partial_load = True
    return options


def _no_orbax_chatter(record: standard_logging.LogRecord) -> bool:
    """Drops Orbax's progress notes, and the tracebacks that its threads log of errors that we report."""
    from_orbax = "/orbax/checkpoint/" in record.pathname
    return not from_orbax or (record.levelno >= standard_logging.WARNING and record.filename != "future.py")
