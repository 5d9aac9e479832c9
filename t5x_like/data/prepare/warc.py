"""Web archives (ISO 28500): the records of WARC and WET files, one at a time and none of them whole if it is too long.

Parsed here in few lines, from any stream: the archive libraries want to seek, which a bounded stream cannot, and one of
them ends the process on damaged input.
"""

import http.client
import io
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_LINE = 2**16  # bytes; longer lines stand in no header


class WarcRecord(NamedTuple):
    """A record.

    Attributes:
      kind: `response`, `conversion`, `metadata`, ...
      uri: Of the page, or an empty string.
      content: At most as many bytes as asked for, and one more if there are more.
    """

    kind: str
    uri: str
    content: bytes


class HttpPage(NamedTuple):
    """An answer of a web server; `body` is as it was sent, perhaps compressed (`encoding`)."""

    status: int
    media_type: str
    charset: str | None
    encoding: str
    body: bytes


def read_warc(stream: BinaryIO, max_bytes: int) -> Iterator[WarcRecord]:
    """Yields the records of an archive.

    Raises:
      EOFError: if the archive ends within a record.
      OSError: if it is none.
    """
    while line := _next_line(stream):
        if not line.startswith(b"WARC/"):
            raise OSError(f"not a web archive: {line[:40]!r} where a record should begin")
        headers = dict(_headers(stream))
        try:
            length = int(headers["content-length"])
        except (KeyError, ValueError) as error:
            raise OSError("not a web archive, or a damaged one: a record without a length") from error
        content = stream.read(min(length, max_bytes + 1))
        left = length - len(content)
        while left > 0 and (skipped := stream.read(min(left, 2**20))):
            left -= len(skipped)
        if left > 0:
            raise EOFError("the archive ends within a record")
        yield WarcRecord(headers.get("warc-type", ""), headers.get("warc-target-uri", "").strip("<>"), content)


def _next_line(stream: BinaryIO) -> bytes:
    """The next line that is not empty; no bytes at the end."""
    while (line := stream.readline(_LINE)) and not line.strip():
        pass
    return line


def _headers(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    while (line := stream.readline(_LINE)) and line.strip():
        name, _, value = line.decode("utf-8", "replace").partition(":")
        yield name.strip().lower(), value.strip()
    if not line:
        raise EOFError("the archive ends within a header")


class _Socket:
    """What `http.client` reads an answer from."""

    def __init__(self, content: bytes):
        self._content = content

    def makefile(self, mode: str) -> BinaryIO:
        return io.BytesIO(self._content)


def parse_http(content: bytes) -> HttpPage:
    """The answer in a `response` record, of which the end may be cut off.

    Raises:
      OSError: if it is none.
    """
    answer = http.client.HTTPResponse(_Socket(content))
    try:
        answer.begin()
        media_type, charset = answer.headers.get_content_type(), answer.headers.get_content_charset()
        encoding = answer.headers.get("Content-Encoding", "").strip().lower()
        try:
            body = answer.read()
        except http.client.IncompleteRead as cut:
            body = cut.partial
    except (http.client.HTTPException, ValueError, LookupError) as error:
        raise OSError(f"not an answer of a web server: {error!r}") from error
    return HttpPage(answer.status, media_type, charset, encoding, body)
