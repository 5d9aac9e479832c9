"""Files that are never seen half written, and addresses that are no files of this machine."""

import os
from pathlib import Path


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address of object storage, e.g. `gs://bucket/run`."""
    return "://" in os.fspath(path)


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
