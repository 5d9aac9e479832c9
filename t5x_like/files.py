"""Files that are never seen half written, directories that have one writer, and addresses of object storage."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from absl import logging

from t5x_like.errors import UserError

T = TypeVar("T")

DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""What reading a file may raise that is not as it was written; RuntimeError is SentencePiece's."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address of object storage, e.g. `gs://bucket/run`."""
    return "://" in os.fspath(path)


def fingerprint(content: str | bytes, size: int = 16) -> str:
    """The same `size` bytes in hexadecimal for equal contents, on every machine; others for all that differ."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replaces a file at once: readers, and whoever comes after a crash, see the old content or the new one, whole."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    # A fixed name: the run has one writer, so a kill leaves at most one leftover, which the next write replaces.
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well, and vanishes when it does not.

    Several processes may make the same file: the last one stays.
    """
    # The suffix stays: numpy adds its own to names without it.
    aside = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield aside
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
      OSError: if it cannot be made, or if `path` has come into being meanwhile and is not empty.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def prepare_once(
    key: str, directory: Path | None, make: Callable[[Path], None], load: Callable[[Path], T], what: str
) -> T:
    """What `load` reads from the files that `make` writes into a directory of its own, unless they are there already.

    Args:
      key: Names everything that the files depend on.
      directory: Where the directories are kept; None keeps nothing.
      make: Writes the files.
      load: Reads them; may map them into memory.
      what: For the log.

    Raises:
      UserError: if the directory cannot be written.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as temporary:  # Mapped files outlive their names.
            return prepare_once(key, Path(temporary), make, load, what)
    place = directory / fingerprint(key, size=8)
    if not place.exists():
        logging.info("Preparing the corpus (once): %s.", what)
        try:
            with new_directory(place) as work:
                make(work)
        except OSError as error:
            if not place.exists():  # Otherwise another process was faster, with the same result.
                raise UserError(f"Cannot keep the tokens of the corpus in {directory}: {error}.") from error
    try:
        return load(place)
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place} is damaged ({error}): remove it, and it will be prepared again.") from error


class InUseError(Exception):
    """Another process holds a lock; the message names it."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which names this process; the lock ends with the process, however that ends.

    Raises:
      InUseError: if another process holds it.
      OSError: if the file cannot be written.
    """
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InUseError(file.read() or "another process") from error
        except OSError as error:
            # Some network file systems have no locks: a run works there, but a second one at the same time is not seen.
            logging.warning("%s cannot be locked (%s): make sure that no other run uses its directory.", path, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
