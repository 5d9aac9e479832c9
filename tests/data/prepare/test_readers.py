import bz2
import gzip
import itertools
import json
import lzma
import os
import zlib

import pytest

from t5x_like.data.prepare.readers import Part, Problem, Reading, Record, read_part
from t5x_like.errors import UserError


def read(path, start=0, end=None, **fields):
    return list(read_part(Part(str(path), "source", start, end), Reading(**fields)))


def contents(records):
    return [record.content for record in records]


def write(path, content):
    path.write_bytes(content)
    return path


def test_plain_text_is_one_document_or_several(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n\nthree")
    assert read(path) == [Record(b"one\n\ntwo\n\nthree", False, str(path))]
    parts = read(path, document_separator="\n\n")
    assert contents(parts) == [b"one", b"two", b"three"]
    assert [part.place for part in parts] == [f"{path}:{number}" for number in (1, 2, 3)]
    assert read(write(tmp_path / "empty.txt", b"")) == []


def test_long_texts_are_cut_behind_line_ends_and_between_characters(tmp_path):
    text = "".join(f"line {number} of a text\n" for number in range(1000)) + "é" * 2000
    path = write(tmp_path / "a.txt", text.encode())
    parts = contents(read(path, max_document_bytes=1025))
    assert b"".join(parts) == text.encode()
    assert max(map(len, parts)) <= 1025
    assert all(part.endswith(b"\n") for part in parts[:-4])
    assert "".join(part.decode() for part in parts) == text


def test_a_gigabyte_without_a_line_end_is_read_in_pieces(tmp_path):
    for name, size in (("a.jsonl", 2**30), ("a.txt", 2**26)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # A sparse file: zeros.
            file.seek(0, os.SEEK_END)
            file.write(b'\n{"text": "behind it"}\n')
    assert read(tmp_path / "a.jsonl") == [
        Problem("longer than max_document_bytes", f"{tmp_path}/a.jsonl at byte 0"),
        Record("behind it", False, f"{tmp_path}/a.jsonl at byte {2**30 + 1}"),
    ]
    sizes = [len(record.content) for record in read_part(Part(f"{tmp_path}/a.txt", "", 0, None), Reading())]
    assert max(sizes) <= 2**21
    assert sum(sizes) == 2**26 + 23


def test_lines_of_json(tmp_path):
    lines = [
        '{"text": "one"}',
        "",
        "{broken",
        '{"other": 1}',
        '{"text": 5}',
        "[1]",
        '"text"',
        "[" * 100_000,
        '{"text": ""}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}')
    records = read(path)
    assert [r.content if isinstance(r, Record) else r.reason for r in records] == [
        "one",
        "not JSON",
        "no field 'text'",
        "field 'text' is no text",
        "no field 'text'",
        "no field 'text'",
        "not JSON",
        "",
        "caf\ufffd",
    ]


def test_parts_of_a_file_of_lines_hold_every_line_once(tmp_path):
    lines = [json.dumps({"text": "x" * (number * 7 % 50)}) for number in range(100)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    whole = read(path)
    size = path.stat().st_size
    for step in (1, 13, 64, 1000):
        bounds = [*range(0, size, step), size]
        parts = [record for a, b in itertools.pairwise(bounds) for record in read(path, a, b)]
        assert parts == whole


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(tmp_path, ending, compress):
    text = os.urandom(3000).hex().encode()
    path = write(tmp_path / f"a.txt{ending}", compress(text))
    assert contents(read(path)) == [text]
    path = write(tmp_path / f"a.jsonl{ending}", compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    assert [(r.content, r.place) for r in read(path)] == [("one", f"{path} at byte 0"), ("two", f"{path} at byte 17")]
    truncated = write(tmp_path / f"b.txt{ending}", compress(text)[:-20])
    [*_, problem] = read(truncated)
    assert problem.reason == "damaged file"
    [problem] = read(write(tmp_path / f"c.txt{ending}", b"this is not compressed"))
    assert problem.reason == "damaged file"


def test_zstandard(tmp_path):
    zstd = pytest.importorskip("backports.zstd", reason="extra: prepare")
    path = write(tmp_path / "a.jsonl.zst", zstd.compress(b'{"text": "one"}\n') + zstd.compress(b'{"text": "two"}\n'))
    assert contents(read(path)) == ["one", "two"]
    [problem] = read(write(tmp_path / "b.jsonl.zst", zstd.compress(os.urandom(1000))[:-20]))
    assert problem.reason == "damaged file"


def test_bombs_are_not_read_to_their_end(tmp_path):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"\0" * 2**27))
    *records, problem = read(path, max_expansion=2)
    assert "expands to more than 67,108,864 bytes" in problem.details
    assert 2**26 - 2**22 <= sum(len(record.content) for record in records) <= 2**26
    assert all(isinstance(record, Record) for record in read(path, max_expansion=2000))


def test_missing_files_are_problems(tmp_path):
    [problem] = read(tmp_path / "gone.txt")
    assert problem.reason == "damaged file"
    assert "No such file" in problem.details


def test_pages_have_a_size(tmp_path):
    path = write(tmp_path / "a.html", b"<p>" + b"x" * 2000)
    assert read(path) == [Record(path.read_bytes(), True, str(path))]
    assert read(path, max_document_bytes=1024) == [Problem("longer than max_document_bytes", str(path))]


def http(body, content_type="text/html; charset=latin-1", status="200 OK", extra=""):
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{extra}\r\n".encode() + body


def warc_record(content, kind="response", uri="https://example.com/"):
    media = "application/http; msgtype=response" if kind == "response" else "text/plain"
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nContent-Type: {media}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content + b"\r\n\r\n"


def test_web_archives(tmp_path):
    deflated = zlib.compress(b"<p>deflated")
    records = [
        warc_record(http("<p>é".encode("latin-1"))),
        warc_record(b"ignored", kind="metadata"),
        warc_record(http(b"\x89PNG", "image/png"), uri="https://example.com/b"),
        warc_record(http(b"gone", status="404 Not Found"), uri="https://example.com/c"),
        warc_record(http(gzip.compress(b"<p>zipped"), extra="Content-Encoding: gzip\r\n"), uri="https://example.com/d"),
        warc_record(http(deflated, extra="Content-Encoding: deflate\r\n"), uri="https://example.com/e"),
        warc_record(
            http(gzip.compress(b"\0" * 2**24), extra="Content-Encoding: gzip\r\n"), uri="https://example.com/f"
        ),
        warc_record(http(b"x" * 2**22), uri="https://example.com/g"),
        warc_record("naïve text".encode(), kind="conversion", uri="https://example.com/h"),
    ]
    expected = [
        Record("<p>é".encode("latin-1"), True, "https://example.com/", "latin-1"),
        Problem("neither HTML nor text", "https://example.com/b"),
        Problem("page with an error status", "https://example.com/c"),
        Record(b"<p>zipped", True, "https://example.com/d", "latin-1"),
        Record(b"<p>deflated", True, "https://example.com/e", "latin-1"),
        Problem("longer than max_document_bytes", "https://example.com/f"),
        Problem("longer than max_document_bytes", "https://example.com/g"),
        Record("naïve text".encode(), False, "https://example.com/h"),
    ]
    assert read(write(tmp_path / "a.warc", b"".join(records))) == expected
    assert read(write(tmp_path / "a.warc.gz", b"".join(map(gzip.compress, records)))) == expected
    chunked = http(b"5\r\n<p>ch\r\n4\r\nunks\r\n0\r\n\r\n", extra="Transfer-Encoding: chunked\r\n")
    assert contents(read(write(tmp_path / "c.warc", warc_record(chunked)))) == [b"<p>chunks"]
    for broken in (b"", b"HTTP/1.1", b"\0" * 100):
        [problem] = read(write(tmp_path / "d.warc", warc_record(broken)))
        assert problem.reason == "damaged page"
    truncated = read(write(tmp_path / "b.warc.gz", b"".join(map(gzip.compress, records))[:-30]))
    # The last record that is whole may go too: decompression fails as soon as the buffer behind it is filled.
    assert truncated[:6] == expected[:6]
    assert truncated[-1].reason == "damaged file"


def test_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="extra: prepare")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "x" * 2000], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", max_document_bytes=1024) == [
        Record("one", False, f"{tmp_path}/a.parquet in row 0"),
        Problem("column 'text' is no text", f"{tmp_path}/a.parquet in row 1"),
        Problem("longer than max_document_bytes", f"{tmp_path}/a.parquet in row 2"),
    ]
    with pytest.raises(UserError, match=r"no column 'body': set Reading.text_field to one of \['text', 'id'\]"):
        read(tmp_path / "a.parquet", text_field="body")
    [problem] = read(write(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-10]))
    assert problem.reason == "damaged file"


def test_remote_files_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(b'{"text": "far away"}\n')
    assert contents(read("memory://corpus/a.jsonl")) == ["far away"]


@pytest.mark.parametrize(
    ("field", "value"), [("max_document_bytes", 10), ("max_expansion", 0.5), ("max_bad_files", -1)]
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(UserError, match=rf"Reading.{field}={value}: must be at least"):
        Reading(**{field: value})
    with pytest.raises(UserError, match="document_separator is an empty string"):
        Reading(document_separator="")
