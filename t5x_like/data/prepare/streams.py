"""Files as streams of bytes: local or remote, compressed or not, and never more than was agreed upon."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import fsspec

from t5x_like.data.extras import require
from t5x_like.errors import UserError
from t5x_like.files import is_remote

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

_ALWAYS_ALLOWED = 2**26  # bytes; small files of zeros are no bombs


class TooLargeError(Exception):
    """A file expands beyond the limit."""


READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, TooLargeError)
"""What reading a missing, truncated, damaged or malicious file raises."""


@contextlib.contextmanager
def open_stream(path: str, max_expansion: float) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, decompressed; reading raises one of `READ_ERRORS`.

    Args:
      path: Of a local file, or an address that fsspec knows, such as `gs://bucket/file.gz`.
      max_expansion: A file that expands to more than this multiple of its size (64 MiB are always allowed) raises
        `TooLargeError` where it passes the limit; the contents are never in memory as a whole.
    """
    with file_system(path).open(path, "rb") if is_remote(path) else open(path, "rb") as file:
        if not path.endswith(COMPRESSIONS):
            yield file
            return
        limit = max(_ALWAYS_ALLOWED, int(max_expansion * file_size(path)))
        with _decompressed(path, file) as stream, io.BufferedReader(_Limited(stream, limit), 2**18) as buffered:
            yield buffered


def file_system(path: str) -> fsspec.AbstractFileSystem:
    """The file system of an address; UserError if it needs a package that is not installed."""
    try:
        return fsspec.core.url_to_fs(path)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def file_size(path: str) -> int:
    return file_system(path).size(path) if is_remote(path) else os.stat(path).st_size


def _decompressed(path: str, file: BinaryIO) -> BinaryIO:
    match os.path.splitext(path)[1]:
        case ".gz":
            return gzip.open(file)
        case ".bz2":
            return bz2.open(file)
        case ".xz":
            return lzma.open(file)
    zstd = require("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", f"Reading {path}")
    return _RaisingOSError(zstd.open(file), zstd.ZstdError)


class _RaisingOSError(io.RawIOBase):
    """A stream whose own kind of error becomes an OSError."""

    def __init__(self, stream: BinaryIO, error: type[Exception]):
        self._stream, self._error = stream, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self._stream.readinto(buffer)
        except self._error as error:
            raise OSError(str(error)) from error


class _Limited(io.RawIOBase):
    """A stream that gives at most so many bytes."""

    def __init__(self, stream: BinaryIO, limit: int):
        self._stream, self._limit, self._left = stream, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise TooLargeError(f"expands to more than {self._limit:,} bytes")
        return count
