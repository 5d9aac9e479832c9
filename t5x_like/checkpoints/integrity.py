"""Checksums of a checkpoint's files, which are also the mark that it is complete.

When all processes have written, each leaves `checksums-PROCESS-of-COUNT.json` with the size and the CRC-32 of the files
that are its own. So a checkpoint is complete when all COUNT of them are there, and whole when every file is as they
say. CRC-32 tells any change of up to 32 neighbouring bits with certainty, any other with 1 - 2^-32.
"""

import json
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from t5x_like.files import is_remote, write_atomic

PIECE = 16 * 2**20
"""Bytes per CRC: a large file has many, taken in parallel."""

READ = 2**20
"""Bytes read at once; they stay in the processor's cache."""

_MARK = re.compile(r"checksums-(\d+)-of-(\d+)\.json")
_OWNER = re.compile(r"(?:^|[./])process_(\d+)(?:/|$)")

Checksums = dict[str, dict[str, Any]]


def write_checksums(directory: epath.Path, process: int = 0, count: int = 1) -> None:
    """Leaves the mark of one of `count` processes, which all have written their files."""
    names = [name for name in _files(directory) if _owner(name) == process]
    mark = directory / f"checksums-{process}-of-{count}.json"
    text = _text(_checksums(directory, names, _crc_written))
    if is_remote(directory):
        mark.write_text(text)  # Objects appear whole.
    else:
        write_atomic(mark, text)  # On a disk a kill could leave half a file under the final name.


def remove_checksums(directory: epath.Path) -> None:
    """Takes the marks away: from here on the checkpoint is a leftover, however little of it gets deleted."""
    for mark in _marks(directory):
        (directory / mark).unlink()


def is_complete(directory: epath.Path) -> bool:
    """True if every process left its mark."""
    return not _missing_marks(directory)


def damage(directory: epath.Path, process: int = 0, count: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty if nothing is.

    Args:
      directory: of the checkpoint.
      process: which share of the files to read, of `count`: processes share the work, whoever wrote the files.
      count: number of shares.
    """
    problems = [f"{name} is missing" for name in _missing_marks(directory)]
    expected: Checksums = {}
    for mark in sorted(_marks(directory)):
        try:
            expected |= _read_mark(directory / mark)
        except ValueError:
            problems.append(f"{mark} is damaged")
    names = sorted(expected)[process::count]
    actual = _checksums(directory, (name for name in names if (directory / name).is_file()), _crc_read)
    for name in names:
        if name not in actual:
            problems.append(f"{name} is missing")
        elif actual[name]["bytes"] != expected[name]["bytes"]:
            problems.append(f"{name} has {actual[name]['bytes']:,} bytes of {expected[name]['bytes']:,}")
        elif actual[name] != expected[name]:
            problems.append(f"{name} is not what was written")
    return problems


def _read_mark(path: epath.Path) -> Checksums:
    """Raises ValueError (of which JSON's and UTF-8's errors are kinds) unless every byte is as it was written."""
    raw = path.read_bytes()
    try:
        checksums = json.loads(raw)["files"]
        inside = all(".." not in name.split("/") and not name.startswith("/") for name in checksums)
        formed = all({"bytes", "crc32"} == set(file) for file in checksums.values())
        if not (inside and formed and _text(checksums).encode() == raw):
            raise ValueError
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError from None
    return checksums


def _text(checksums: Mapping[str, Any]) -> str:
    content = json.dumps(checksums, indent=1, sort_keys=True)
    return json.dumps({"files": checksums, "crc32": zlib.crc32(content.encode())}, indent=1, sort_keys=True) + "\n"


def _marks(directory: epath.Path) -> list[str]:
    return [path.name for path in directory.iterdir() if _MARK.fullmatch(path.name)] if directory.is_dir() else []


def _missing_marks(directory: epath.Path) -> list[str]:
    marks = _marks(directory)
    counts = {int(_MARK.fullmatch(name)[2]) for name in marks}
    wanted = [f"checksums-{process}-of-{max(counts, default=1)}.json" for process in range(max(counts, default=1))]
    return [name for name in wanted if name not in marks]


def _files(directory: epath.Path, prefix: str = "") -> Iterable[str]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif prefix or not _MARK.fullmatch(path.name.removeprefix(".").removesuffix(".tmp")):
            yield prefix + path.name


def _owner(name: str) -> int:
    """The process that wrote a file: Orbax names it in the path where it is not process 0."""
    found = _OWNER.search(name)
    return int(found[1]) if found else 0


def _checksums(directory: epath.Path, names: Iterable[str], read: Callable[[epath.Path, int], int]) -> Checksums:
    sizes = {name: (directory / name).stat().length for name in names}
    pieces = [(name, start) for name, size in sizes.items() for start in range(0, size, PIECE)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        crcs = list(pool.map(lambda piece: read(directory / piece[0], piece[1]), pieces))
    checksums: Checksums = {name: {"bytes": size, "crc32": []} for name, size in sizes.items()}
    for (name, _), crc in zip(pieces, crcs, strict=True):
        checksums[name]["crc32"].append(crc)
    return checksums


def _crc_read(path: epath.Path, start: int) -> int:
    """The CRC-32 of one piece of a file; OSError where the disk fails."""
    crc, left = 0, PIECE
    with path.open("rb") as file:
        file.seek(start)
        while left and (chunk := file.read(min(left, READ))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc


def _crc_written(path: epath.Path, start: int) -> int:
    """The CRC-32 of one piece of a file that has just been written: mapped from memory, a quarter of the time less."""
    if is_remote(path):
        return _crc_read(path, start)
    # A disk that fails under a mapping would kill the process: hence not for files from former days.
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as view,
    ):
        return zlib.crc32(view[start : start + PIECE])
