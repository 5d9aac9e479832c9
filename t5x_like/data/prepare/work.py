"""Units of work, and the files that they leave behind: written aside, then renamed, so that a name means complete."""

import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t5x_like.data.prepare.config import PrepareConfig
from t5x_like.data.prepare.readers import FORMATS, Part, file_format
from t5x_like.data.prepare.streams import COMPRESSIONS, file_size, file_system
from t5x_like.errors import UserError
from t5x_like.files import fingerprint, is_remote, new_file

_FORMAT = 1


class Unit(NamedTuple):
    """Files, or parts of them, that become one shard.

    Attributes:
      number: In the order of the corpus.
      parts: What is read.
      bytes: Their size.
    """

    number: int
    parts: tuple[Part, ...]
    bytes: int


class Plan(NamedTuple):
    """All units; `key` differs if the corpus may become another one."""

    units: tuple[Unit, ...]
    key: str


def make_plan(config: PrepareConfig) -> Plan:
    """Lists the files, in the sorted order of their paths, and divides them into units.

    Raises:
      UserError: if a pattern matches no file.
    """
    files: dict[str, str] = {}
    for pattern in config.patterns:
        for path in _matches(pattern):
            files.setdefault(path, pattern)
    sizes = {path: file_size(path) for path in sorted(files)}
    parts = [part for path, size in sizes.items() for part in _parts(path, files[path], size, config.shard_bytes)]
    units, here, room = [], [], 0
    for part, size in parts:
        if here and size > room:
            units.append(tuple(here))
            here = []
        if not here:
            room = config.shard_bytes
        here.append(part)
        room -= size
    if here:
        units.append(tuple(here))
    size_of = dict(parts)
    listed = tuple(Unit(number, unit, sum(size_of[part] for part in unit)) for number, unit in enumerate(units))
    return Plan(listed, _key(config, sizes))


def _matches(pattern: str) -> list[str]:
    """The files of a path, directory or glob; in directories and below only those of known formats."""
    pattern = os.path.expanduser(pattern)
    if is_remote(pattern):
        found = _remote_matches(pattern)
    elif os.path.isdir(pattern):
        found = [path for path in glob.glob(f"{glob.escape(pattern)}/**/*", recursive=True) if _is_known(path)]
    else:
        # A file whose name looks like a glob is still a file.
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = [path for path in found if is_remote(path) or os.path.isfile(path)]
    if not files:
        raise UserError(
            f"PrepareConfig.files: no file matches {pattern!r} (in {os.getcwd()}): check the path. In a directory, "
            f"files with the endings {' '.join(FORMATS)} count, each also with {' '.join(COMPRESSIONS)}."
        )
    return files


def _remote_matches(pattern: str) -> list[str]:
    system = file_system(pattern)
    if system.isdir(pattern):
        found = filter(_is_known, system.find(pattern))
    else:
        found = filter(system.isfile, system.glob(pattern))
    return [system.unstrip_protocol(path) for path in found]


def _is_known(path: str) -> bool:
    base, ending = os.path.splitext(path)
    return (os.path.splitext(base)[1] if ending in COMPRESSIONS else ending).lower() in FORMATS


def _parts(path: str, source: str, size: int, shard_bytes: int) -> Iterator[tuple[Part, int]]:
    """Yields (part, bytes) of a file; a large file of lines is cut, so that several processes can read it."""
    if file_format(path) != "jsonl" or path.endswith(COMPRESSIONS) or size <= shard_bytes:
        yield Part(path, source, 0, None), size
        return
    for start in range(0, size, shard_bytes):
        end = min(start + shard_bytes, size)
        yield Part(path, source, start, end), end - start


def _key(config: PrepareConfig, sizes: dict[str, int]) -> str:
    """A hash of the input's state and of all that decides what becomes of it."""
    stages = [stage.cache_key() for stage in config.stages]
    decided = (config.reading, config.html, config.deduplication, config.shard_bytes, config.keep_text)
    modified = [(path, size, 0 if is_remote(path) else os.stat(path).st_mtime_ns) for path, size in sizes.items()]
    facts = (_FORMAT, config.patterns, stages, decided, config.tokenizer.cache_key(), modified)
    return fingerprint(repr(facts))


def write_json(path: Path, content: Any):
    with new_file(path) as aside:
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=1))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]):
    """Writes JSON lines, compressed; the same lines give the same bytes."""
    with new_file(path) as aside, open(aside, "wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path) as file:
        for line in file:
            yield json.loads(line)
