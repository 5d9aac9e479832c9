"""MODEL_DIR: the one directory that holds all of a run, and the lock that gives it one writer."""

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

import t5x_like
from t5x_like.checkpoints.mirror import Mirror
from t5x_like.errors import UserError
from t5x_like.files import InUseError, is_remote, locked

LOCK = "run.lock"
OLDEST = (0, 2)
"""The first version of this package whose runs can be read."""


class RunDirectory:
    """Where a run's files are: on a local or mounted disk, or on object storage.

    Attributes:
      address: MODEL_DIR itself.
      path: the directory of this machine that holds all but the checkpoints: MODEL_DIR, or a copy of it; see `pull`.
      checkpoints: directory of saved states.
      metrics: one JSON object per record.
      loss_plot: curves of training and validation loss.
      operative_config: every parameter of the run, in gin.
      config: the configuration and the environment (versions, devices, ...), in JSON.
      data: directory of what data preparation keeps, e.g. a trained tokenizer.
      tensorboard: directory of TensorBoard events.
      goodput: where the time went, by cause, in JSON.
      rollbacks: returns to a checkpoint, with the data left out, in JSON.
      model_config: of an imported model, in gin, to be included by a run file.
      huggingface: of an imported model, `config.json` and the tokenizer's files as they were.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.address = os.fspath(path).rstrip("/")
        self._mirror = None
        self.path = Path(path)
        self.checkpoints: Path | epath.Path = self.path / "checkpoints"
        if is_remote(path):
            self.path = Path(tempfile.mkdtemp(prefix="t5x_like-"))
            atexit.register(shutil.rmtree, self.path, ignore_errors=True)
            self._mirror = Mirror(self.address, self.path)
            self.checkpoints = self._mirror.remote / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.operative_config = self.path / "operative_config.gin"
        self.config = self.path / "config.json"
        self.data = self.path / "data"
        self.tensorboard = self.path / "tensorboard"
        self.goodput = self.path / "goodput.json"
        self.rollbacks = self.path / "rollbacks.json"
        self.model_config = self.path / "model.gin"
        self.huggingface = self.path / "huggingface"

    def pull(self) -> None:
        """Brings the files of a run on object storage here; else they are here.

        Raises:
          UserError: if that cannot be reached.
        """
        if self._mirror is not None:
            self._mirror.pull()

    def push(self) -> None:
        """Takes what has changed to the object storage, where the run is on one.

        Raises:
          UserError: if that cannot be written.
        """
        if self._mirror is not None:
            self._mirror.push()

    def require(self) -> None:
        """Checks that a run was started here, and pulls its files; for commands that only read.

        Raises:
          UserError: if not.
        """
        self.pull()
        if not self.operative_config.exists():
            raise UserError(f"MODEL_DIR {self.address} holds no run: train first, or correct the path.")
        self.read_config()

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the run and its environment, as `config/save.py` wrote them; None if there is none.

        Raises:
          UserError: if a version of this package wrote them whose runs have other names.
        """
        if not self.config.exists():
            return None
        saved = json.loads(self.config.read_text())
        version = saved["versions"]["t5x_like"]
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise UserError(
                f"MODEL_DIR {self.address} holds a run of t5x_like {version}, whose settings and parameters have other "
                f"names than those of {t5x_like.__version__}: train it anew in another MODEL_DIR, or use that version."
            )
        return saved

    def check_same_experiment(self, differences: Sequence[str]) -> None:
        """Checks that the run here is the one to be continued.

        Args:
          differences: what may not change within a run and did, one "path: old -> new" each.

        Raises:
          UserError: if there are any.
        """
        if differences:
            raise UserError(
                f"MODEL_DIR {self.address} holds a run with another configuration:\n  "
                + "\n  ".join(differences)
                + "\nContinue it with its own configuration (operative_config.gin there), choose another MODEL_DIR, or "
                "accept differences by name: --allow_changes=PATH,..."
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Creates the directory if need be and holds its lock; for the one process that writes (process 0 of several).

        The lock ends with the process, however that ends. Object storage has none.

        Raises:
          UserError: if the directory cannot be written, holds something else, or another process writes to it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.pull()
                self._create()
                stack.enter_context(locked(self.path / LOCK))
            except InUseError as holder:
                raise UserError(
                    f"MODEL_DIR {self.path} is in use by {holder}: wait for it, stop it, or choose another MODEL_DIR."
                ) from holder
            except OSError as error:
                raise UserError(
                    f"MODEL_DIR {self.address} cannot be written ({error.strerror}): choose one where you may write."
                ) from error
            stack.callback(self.push)  # however the run ends: its report of a bad batch, too
            yield

    def _create(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"MODEL_DIR {self.path} is a file: choose a directory.")
        self.path.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in self.path.iterdir())
        if names and LOCK not in names and self.operative_config.name not in names:
            raise UserError(
                f"MODEL_DIR {self.address} is no run but holds {len(names)} other files or directories "
                f"({', '.join(names[:3])}): choose a new one."
            )
