"""Records of files: plain text, JSON lines, web pages, web archives (WARC, WET) and Parquet tables.

Readers are generators that hold one record at a time. What cannot be read is yielded as a `Problem`, in its place
among the records, so that it is counted and never stops the others; damage to a file ends that file.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from t5x_like.configurable import configurable
from t5x_like.data.extras import require
from t5x_like.data.prepare.streams import COMPRESSIONS, READ_ERRORS, open_stream
from t5x_like.data.prepare.warc import parse_http, read_warc
from t5x_like.errors import UserError

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".warc": "warc",
    ".wet": "warc",
    ".parquet": "parquet",
}
"""Formats by the ending of a file's name, that of its compression taken off; other files are read as plain text."""

DAMAGED = "damaged file"
"""The reason of a problem that ends its file."""


@configurable
class Reading:
    """How files become documents, and how much of them is taken at most.

    Attributes:
      text_field: The field of a JSON object, or the column of a table, that holds the text.
      document_separator: What separates the documents of a plain text file; None: a file is one document.
      max_document_bytes: A longer plain text is cut into documents; a longer line, page or archive record is dropped.
        It bounds memory: a process takes about 100 times as much at most, beside 200 MB.
      max_expansion: A compressed file that expands to more than so many times its size, and to more than 64 MiB, is
        not read further.
      max_bad_files: Files that may be missing, damaged or expand too far; with more of them preparation ends.
    """

    text_field: str = "text"
    document_separator: str | None = None
    max_document_bytes: int = 2**21
    max_expansion: float = 100.0
    max_bad_files: int = 10

    def __post_init__(self):
        if self.document_separator == "":
            raise UserError("Reading.document_separator is an empty string: leave it None for one document per file.")
        for field, least in (("max_document_bytes", 1024), ("max_expansion", 1), ("max_bad_files", 0)):
            if getattr(self, field) < least:
                raise UserError(f"Reading.{field}={getattr(self, field)}: must be at least {least}.")


class Record(NamedTuple):
    """Something that may become a document.

    Attributes:
      content: Its text, or bytes in an encoding that is still to be found out.
      is_html: Whether the text has to be extracted from markup.
      place: Where it is.
      charset: The encoding that the server of a page told, if any.
    """

    content: str | bytes
    is_html: bool
    place: str
    charset: str | None = None


class Problem(NamedTuple):
    """What could not be read."""

    reason: str
    place: str
    details: str = ""


class Part(NamedTuple):
    """A file, or of a file of lines those that begin from byte `start` to before byte `end`."""

    path: str
    source: str
    start: int
    end: int | None


def file_format(path: str) -> str:
    """The format of a file by its name."""
    base, ending = os.path.splitext(path)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(base)[1]
    return FORMATS.get(ending.lower(), "text")


def read_part(part: Part, reading: Reading) -> Iterator[Record | Problem]:
    """Yields what a file holds."""
    read = {"text": _read_text, "jsonl": _read_lines, "html": _read_page, "warc": _read_archive, "parquet": _read_table}
    try:
        with open_stream(part.path, reading.max_expansion) as stream:
            yield from read[file_format(part.path)](stream, part, reading)
    except READ_ERRORS as error:
        yield Problem(DAMAGED, part.path, f"{type(error).__name__}: {error}")


def _read_text(stream: BinaryIO, part: Part, reading: Reading) -> Iterator[Record]:
    separator = reading.document_separator and reading.document_separator.encode()
    pending, count = b"", 0
    while chunk := stream.read(min(2**20, reading.max_document_bytes)):
        *documents, pending = _cut_text(pending + chunk, separator, reading.max_document_bytes)
        for document in documents:
            count += 1
            yield Record(document, False, f"{part.path}:{count}")
    if pending:
        yield Record(pending, False, f"{part.path}:{count + 1}" if count else part.path)


def _cut_text(raw: bytes, separator: bytes | None, limit: int) -> Iterator[bytes]:
    """Yields the complete documents of a text, long ones cut behind line ends, and last what may go on."""
    *documents, last = raw.split(separator) if separator else [raw]
    for document in documents:
        yield from _cut_long(document, limit)
    yield from _cut_long(last, limit)


def _cut_long(raw: bytes, limit: int) -> Iterator[bytes]:
    start = 0
    while len(raw) - start > limit:
        end = raw.rfind(b"\n", start, start + limit) + 1 or _character_start(raw, start + limit)
        yield raw[start:end]
        start = end
    yield raw[start:]


def _character_start(raw: bytes, place: int) -> int:
    """The place itself, or up to three bytes before it where a UTF-8 character would be cut."""
    for candidate in range(place, place - 4, -1):
        if raw[candidate] & 0xC0 != 0x80:
            return candidate
    return place


def _read_lines(stream: BinaryIO, part: Part, reading: Reading) -> Iterator[Record | Problem]:
    """Reads objects; a line belongs to the part in which it begins."""
    at = part.start
    if at:
        stream.seek(at - 1)
        at += _skip_line(stream) - 1
    while part.end is None or at < part.end:
        line = stream.readline(reading.max_document_bytes + 1)
        if not line:
            return
        place = f"{part.path} at byte {at}"
        at += len(line)
        if len(line) > reading.max_document_bytes:
            at += 0 if line.endswith(b"\n") else _skip_line(stream)
            yield Problem("longer than max_document_bytes", place)
        elif line.strip():
            yield _parse_line(line, place, reading.text_field)


def _skip_line(stream: BinaryIO) -> int:
    """Passes the rest of a line, and returns its bytes."""
    count = 0
    while piece := stream.readline(2**16):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count


def _parse_line(line: bytes, place: str, field: str) -> Record | Problem:
    try:
        text = json.loads(line.decode("utf-8-sig", "replace"))[field]
    except (json.JSONDecodeError, RecursionError):
        return Problem("not JSON", place)
    except (KeyError, TypeError, IndexError):
        return Problem(f"no field {field!r}", place)
    return Record(text, False, place) if isinstance(text, str) else Problem(f"field {field!r} is no text", place)


def _read_page(stream: BinaryIO, part: Part, reading: Reading) -> Iterator[Record | Problem]:
    page = stream.read(reading.max_document_bytes + 1)
    if len(page) > reading.max_document_bytes:
        yield Problem("longer than max_document_bytes", part.path)
    else:
        yield Record(page, True, part.path)


def _read_archive(stream: BinaryIO, part: Part, reading: Reading) -> Iterator[Record | Problem]:
    """Reads the answers (`response`) of a WARC file, and the texts (`conversion`) of a WET file."""
    for number, record in enumerate(read_warc(stream, reading.max_document_bytes)):
        place = record.uri or f"{part.path} in record {number}"
        if record.kind in ("response", "conversion") and len(record.content) > reading.max_document_bytes:
            yield Problem("longer than max_document_bytes", place)
        elif record.kind == "response":
            yield _page(record.content, place, reading)
        elif record.kind == "conversion":
            yield Record(record.content, False, place)


def _page(content: bytes, place: str, reading: Reading) -> Record | Problem:
    try:
        page = parse_http(content)
        if page.status != 200:
            return Problem("page with an error status", place)
        if page.media_type not in ("text/html", "application/xhtml+xml", "text/plain"):
            return Problem("neither HTML nor text", place)
        body = _decode_body(page.body, page.encoding, reading)
    except READ_ERRORS as error:
        return Problem("damaged page", place, details=str(error))
    if len(body) > reading.max_document_bytes:
        return Problem("longer than max_document_bytes", place)
    return Record(body, page.media_type != "text/plain", place, page.charset)


def _decode_body(body: bytes, encoding: str, reading: Reading) -> bytes:
    limit = reading.max_document_bytes + 1
    if encoding in ("gzip", "x-gzip") and body[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=io.BytesIO(body)).read(limit)
    if encoding == "deflate":
        return zlib.decompressobj().decompress(body, limit)
    return body


def _read_table(stream: BinaryIO, part: Part, reading: Reading) -> Iterator[Record | Problem]:
    parquet = require("pyarrow.parquet", f"Reading {part.path}")
    arrow = require("pyarrow", f"Reading {part.path}")
    try:
        table = parquet.ParquetFile(stream)
        if reading.text_field not in table.schema_arrow.names:
            raise UserError(
                f"{part.path} has no column {reading.text_field!r}: set Reading.text_field to one of "
                f"{table.schema_arrow.names}."
            )
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=[reading.text_field]):
            for value in batch.column(0).to_pylist():
                yield _cell(value, f"{part.path} in row {number}", reading)
                number += 1
    except arrow.ArrowException as error:
        raise OSError(f"not a Parquet file, or a damaged one: {error}") from error


def _cell(value: object, place: str, reading: Reading) -> Record | Problem:
    if not isinstance(value, str | bytes):
        return Problem(f"column {reading.text_field!r} is no text", place)
    if len(value) > reading.max_document_bytes:
        return Problem("longer than max_document_bytes", place)
    return Record(value, False, place)
