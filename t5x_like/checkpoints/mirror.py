"""A run directory on object storage, `gs://...`: checkpoints are written there, all other files here and copied there.

Object stores cannot append to a file, as metrics and events need, and know no locks. So what is there is the run as of
its last checkpoint, and every start begins with a fresh copy of it.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from t5x_like.errors import UserError

APART = {"checkpoints", "run.lock"}
"""What is not copied: what is written there itself, and what concerns this machine alone."""


class Mirror:
    """Copies a run's files between a remote directory and a local one.

    Attributes:
      remote: the directory that lasts.
      local: the one on this machine.
    """

    def __init__(self, address: str, local: Path):
        self.remote, self.local = epath.Path(address), local
        self._pushed: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Copies everything from there to here.

        Raises:
          UserError: if it cannot be reached.
        """
        with self._reaching():
            for name in _names(self.remote) if self.remote.exists() else ():
                _copy(self.remote / name, self.local / name)
                self._pushed[name] = _version(self.local / name)

    def push(self) -> None:
        """Copies what has changed here since the last time.

        Raises:
          UserError: if it cannot be written.
        """
        with self._reaching():
            for name in _names(epath.Path(self.local)):
                version = _version(self.local / name)
                if self._pushed.get(name) != version:
                    _copy(self.local / name, self.remote / name)
                    self._pushed[name] = version

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Storage drivers raise what they like.
            raise UserError(
                f"MODEL_DIR {self.remote} cannot be reached: {error}. It needs the extra `gcs` "
                "(pip install -e '.[gcs]'), credentials (gcloud auth application-default login) and its bucket."
            ) from error


def _copy(source: Path | epath.Path, target: Path | epath.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 2**22)


def _names(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    """Paths of the files to copy, relative to the directory; hidden ones are being written."""
    for path in directory.iterdir():
        if path.is_dir():
            if prefix or path.name not in APART:
                yield from _names(path, f"{prefix}{path.name}/")
        elif not path.name.startswith(".") and path.name not in APART:
            yield prefix + path.name


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
