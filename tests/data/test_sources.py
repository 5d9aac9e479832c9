import gzip
import json

import pytest
from absl import logging

from t5x_like.data import sources
from t5x_like.data.sources import TextSource
from t5x_like.errors import UserError


def read(files, **fields):
    return list(TextSource(files=files, **fields).documents())


def test_reads_every_format_in_sorted_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three\\n"}\n{"text": ""}\n')
    (tmp_path / "a.txt").write_bytes("\ufeffone é\r\n".encode())
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"body": "x", "text": "four"}).encode()))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"five"))
    expected = ["one é\r\n", "two", "three\n", "four", "five"]
    assert read(f"{tmp_path}/*") == expected
    assert read((f"{tmp_path}/d.txt.gz", f"{tmp_path}/*.*", f"{tmp_path}/a.txt")) == expected
    assert read(f"{tmp_path}/c*", text_field="body") == ["x"]


def test_separator_makes_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one<|end|>two\n<|end|>")
    assert read(f"{tmp_path}/a.txt", document_separator="<|end|>") == ["one", "two\n"]


def test_a_file_named_like_a_glob_is_read(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert read(f"{tmp_path}/a[1].txt") == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"ab\0c", "NUL"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"other": "x"}\n', r"a\.jsonl:2 .*field 'text'"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1 .*field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: .* is int, not a string"),
        ("a.txt.gz", gzip.compress(b"x" * 10_000, mtime=0)[:-10], r"Cannot read .*a\.txt\.gz"),
        ("a.jsonl.gz", b"no gzip at all", r"Cannot read .*a\.jsonl\.gz"),
    ],
    ids=["empty", "nul", "half_a_line", "another_field", "no_object", "no_string", "cut_gzip", "no_gzip"],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(f"{tmp_path}/{name}")


def test_missing_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match=r"no file matches .*b\*"):
        read((f"{tmp_path}/a.txt", f"{tmp_path}/b*"))
    with pytest.raises(UserError, match="directory, try"):
        read(str(tmp_path))
    with pytest.raises(UserError, match="files is empty"):
        TextSource(files=())


def test_invalid_utf8_is_replaced_and_counted_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd \xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud800!"}\n{"text": "\xfe"}\n')
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: warnings.append(message % values))
    sources._warn_once.cache_clear()
    for _ in range(2):
        texts = read(f"{tmp_path}/*")
        # A half surrogate is three bytes in UTF-8, none of which is valid there.
        assert texts == ["caf\ufffd \ufffd \ufffd", "\ufffd\ufffd\ufffd!", "\ufffd"]
    assert len(warnings) == 1
    assert "6 sequences of bytes were not UTF-8" in warnings[0]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"ab\xe9"), ("a.jsonl", b'{"text": "\xe9"}'), ("a.jsonl", b'{"text": "\\ud800"}')]
)
def test_invalid_utf8_is_refused_on_request(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"byte \d+ \(0x.*not UTF-8"):
        read(f"{tmp_path}/{name}", invalid_utf8="refuse")


def test_cache_key_follows_the_files(tmp_path):
    source = TextSource(files=f"{tmp_path}/*.txt")
    (tmp_path / "a.txt").write_text("one")
    first = source.cache_key()
    assert source.cache_key() == first
    (tmp_path / "a.txt").write_text("longer")
    second = source.cache_key()
    (tmp_path / "b.txt").write_text("two")
    assert len({first, second, source.cache_key()}) == 3
