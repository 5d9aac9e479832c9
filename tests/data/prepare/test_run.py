import contextlib
import errno
import gzip
import io
import json
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
from rich.console import Console

from t5x_like.configurable import REGISTRY, configurable
from t5x_like.data.prepare import passes, work
from t5x_like.data.prepare.config import Deduplication, PrepareConfig
from t5x_like.data.prepare.document import Document, Dropped, Stage
from t5x_like.data.prepare.engine import LocalEngine
from t5x_like.data.prepare.readers import Reading
from t5x_like.data.prepare.run import prepare
from t5x_like.data.prepare.stages.filters import GopherQualityFilter
from t5x_like.data.prepare.stages.text import NormalizeText
from t5x_like.data.prepared import PreparedSource
from t5x_like.data.splits import Split
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import ByteTokenizerConfig
from t5x_like.errors import UserError

ONE = LocalEngine(1, console=Console(file=io.StringIO()))
NOTICE = "All rights reserved. Reproduction of any part of this page is forbidden by law."
WORDS = "the garden of roses and an old house that stands with its walls to the street"


def sentences(rng, count):
    words = WORDS.split()
    return "\n".join(" ".join(rng.choices(words, k=15)).capitalize() + "." for _ in range(count))


@pytest.fixture
def pages(tmp_path):
    """Texts, lines and pages, with an exact and a near duplicate, a notice on every page, and damage."""
    rng = random.Random(0)
    texts = [sentences(rng, 20) for _ in range(30)]
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(10):
        page = f"<html><nav>Menu</nav><p>{texts[number]}</p><p>{NOTICE}</p></html>"
        (folder / f"{number}.html").write_text(page.replace("\n", "<br>"))
    lines = [json.dumps({"text": text}) for text in [*texts[10:], texts[12], texts[13] + "\nOne more line."]]
    (folder / "b.jsonl").write_text("\n".join([*lines, "{broken", '{"text": ""}']) + "\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress(texts[0].encode() * 3)[:-9])
    (folder / "d.txt").write_bytes(b"\0\1\2" * 100)
    (folder / "notes.unknown").write_text("not read")
    return folder


def config(pages, directory, **fields):
    defaults = {"tokenizer": ByteTokenizerConfig(), "deduplication": Deduplication(lines=True), "shard_bytes": 6000}
    return PrepareConfig(files=str(pages), directory=str(directory), **(defaults | fields))


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def corpus_texts(directory):
    corpus = PreparedSource(directory=str(directory)).corpus(Split("document", 0.2))
    return [
        corpus.tokenizer.decode(tokens.stream[a:b])
        for tokens in (corpus.train, corpus.validation)
        for a, b in zip(tokens.starts, tokens.ends, strict=True)
    ]


def outcomes(report, stage):
    [found] = [entry["outcomes"] for entry in report["stages"] if entry["stage"] == stage]
    return {outcome: units.get("documents", units) for outcome, units in found.items()}


def test_everything_is_accounted_for(pages, tmp_path):
    report = prepare(config(pages, tmp_path / "out", keep_text=True), ONE)
    assert outcomes(report, "read") == {"found": 36, "dropped: damaged file": 1, "dropped: not JSON": 1}
    assert outcomes(report, "extract") == {"kept": 33, "dropped: empty": 1}
    assert outcomes(report, "NormalizeText") == {"kept": 32, "dropped: not text": 1}
    assert outcomes(report, "deduplicate") == {
        "kept": 30,
        "dropped: duplicate": 1,
        "dropped: near duplicate": 1,
        "repeated lines taken away": {"characters": 9 * (len(NOTICE) + 2)},
    }
    texts = corpus_texts(tmp_path / "out")
    assert len(set(texts)) == len(texts) == 30 == report["totals"]["documents"]
    assert sum(NOTICE in text for text in texts) == 1
    assert not any("Menu" in text or "not read" in text for text in texts)
    assert report["totals"]["tokens"] == sum(len(text.encode()) + 1 for text in texts)
    lines = b"".join(gzip.decompress(file.read_bytes()) for file in (tmp_path / "out" / "text").iterdir())
    kept = [json.loads(line)["text"] for line in lines.splitlines()]
    assert sorted(kept) == sorted(texts)
    [near] = [e for e in report["examples"] if e["reason"] == "near duplicate"]
    assert near["documents"][0]["place"].startswith(f"{pages}/b.jsonl at byte")
    [source] = report["sources"]
    assert source["source"] == str(pages)
    assert source["documents"] == 30


def test_the_result_does_not_depend_on_the_number_of_processes(pages, tmp_path):
    fields = {"tokenizer": SentencePieceConfig(vocab_size=300), "keep_text": True}
    prepare(config(pages, tmp_path / "one", **fields), ONE)
    with LocalEngine(3) as engine:
        prepare(config(pages, tmp_path / "three", **fields), engine)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert len(list((tmp_path / "one").glob("*.array_record"))) > 3


class Stopping:
    """Runs the items of every pass in a random order, and breaks off after some of them."""

    def __init__(self, rng, budget):
        self.rng, self.left = rng, budget

    def run(self, function, items, label):
        for item in self.rng.sample(list(items), len(items)):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            function(item)


def test_a_stopped_preparation_goes_on_and_ends_the_same(pages, tmp_path):
    rng = random.Random(1)
    prepare(config(pages, tmp_path / "whole"), ONE)
    for calls in range(60):
        with contextlib.suppress(KeyboardInterrupt):
            prepare(config(pages, tmp_path / "stopped"), Stopping(rng, calls))
    assert files(tmp_path / "whole") == files(tmp_path / "stopped")
    # What is finished is not made again.
    prepare(config(pages, tmp_path / "whole"), Stopping(rng, 0))


def test_a_disk_that_is_full_in_the_middle(pages, tmp_path, monkeypatch):
    real, count = passes.ShardWriter, [0]

    class Full(real):
        def close(self):
            count[0] += 1
            if count[0] == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().close()

    monkeypatch.setattr(passes, "ShardWriter", Full)
    with pytest.raises(UserError, match=r"No space left on device\. What is finished is kept"):
        prepare(config(pages, tmp_path / "out"), ONE)
    assert len(list((tmp_path / "out").glob("*.array_record"))) == 2
    prepare(config(pages, tmp_path / "out"), ONE)
    prepare(config(pages, tmp_path / "expected"), ONE)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_told(capfd):
    with LocalEngine(2) as engine, pytest.raises(UserError, match=r"A worker process died.*--workers"):
        engine.run(die, [1, 2, 3], "Dying")


def hold_lock(cfg, started, release):
    class Waiting:
        def run(self, function, items, label):
            started.set()
            release.wait(60)
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        prepare(cfg, Waiting())


def test_two_at_once_are_refused(pages, tmp_path):
    context = multiprocessing.get_context("spawn")
    started, release = context.Event(), context.Event()
    process = context.Process(target=hold_lock, args=(config(pages, tmp_path / "out"), started, release))
    process.start()
    assert started.wait(60)
    with pytest.raises(UserError, match="Another process prepares"):
        prepare(config(pages, tmp_path / "out"), ONE)
    release.set()
    process.join()
    prepare(config(pages, tmp_path / "out"), ONE)


def test_other_files_or_another_configuration_need_another_directory(pages, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(config(pages, out), Stopping(random.Random(0), 2))
    with pytest.raises(UserError, match="holds an unfinished corpus of other files, or of another configuration"):
        prepare(config(pages, out, shard_bytes=7000), ONE)
    prepare(config(pages, out), ONE)
    (pages / "new.txt").write_text("More text.")
    with pytest.raises(UserError, match="holds a corpus of other files"):
        prepare(config(pages, out), ONE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no corpus"):
        prepare(config(pages, tmp_path / "full"), ONE)


def test_too_many_damaged_files_are_named(pages, tmp_path):
    with pytest.raises(UserError, match=r"1 files are .*max_bad_files=0: .*c\.txt\.gz \(EOFError.*allow 1"):
        prepare(config(pages, tmp_path / "out", reading=Reading(max_bad_files=0)), ONE)


def test_nothing_left(tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    strict = (NormalizeText(), GopherQualityFilter())
    with pytest.raises(UserError, match=r"Nothing is left of .*GopherQualityFilter: dropped: fewer words"):
        prepare(config(tmp_path / "a.txt", tmp_path / "out", stages=strict), ONE)
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"Nothing is left of .*the files are empty"):
        prepare(config(tmp_path / "b.txt", tmp_path / "out2"), ONE)


@pytest.mark.parametrize("files", ["missing", "missing/*.txt", "empty"])
def test_patterns_without_files(tmp_path, files, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "image.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"no file matches '{files.replace('*', '.*')}' .in {tmp_path}.: check the path"
    ):
        prepare(config(files, tmp_path / "out"), ONE)


def test_bad_fields_are_named():
    for fields, message in (
        ({"files": ()}, "files is empty"),
        ({"directory": "gs://bucket/x"}, r"directory='gs://bucket/x': .*gcsfuse"),
        ({"shard_bytes": 0}, "shard_bytes=0: must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            PrepareConfig(**{"files": "a", "directory": "b", **fields})


def test_a_stage_of_ones_own(pages, tmp_path):
    @configurable
    class MentionsFilter(Stage):
        """A classifier.

        Attributes:
          word: That documents need.
        """

        word: str

        def process(self, document: Document) -> Document | Dropped:
            return document if self.word in document.text else Dropped("not mentioned")

    try:
        stages = (NormalizeText(), MentionsFilter(word="One more line"))
        report = prepare(config(pages, tmp_path / "out", stages=stages), ONE)
    finally:
        del REGISTRY["MentionsFilter"]
    assert outcomes(report, "MentionsFilter") == {"kept": 1, "dropped: not mentioned": 31}


def test_large_files_of_lines_are_shared_between_units(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(1000)))
    (tmp_path / "b.txt").write_text("small")
    (tmp_path / "c.txt").write_text("small")
    plan = work.make_plan(config(tmp_path, tmp_path / "out", shard_bytes=6000))
    assert [[part.path[-1] + str(part.start) for part in unit.parts] for unit in plan.units] == [
        ["l0"],
        ["l6000"],
        ["l12000"],
        ["l18000", "t0", "t0"],
    ]
    report = prepare(config(tmp_path, tmp_path / "out", deduplication=Deduplication(near=None, documents=False)), ONE)
    assert report["totals"]["documents"] == 1002


def test_remote_files(tmp_path):
    import fsspec

    for name in ("a/one.txt", "a/b/two.txt", "a/image.png"):
        with fsspec.open(f"memory://remote/{name}", "w") as file:
            file.write(f"text of {name}")
    for pattern, names in (
        ("memory://remote/a", ["a/b/two.txt", "a/one.txt"]),
        ("memory://remote/**/*.txt", ["a/b/two.txt", "a/one.txt"]),
        ("memory://remote/a/one.txt", ["a/one.txt"]),
    ):
        plan = work.make_plan(config(pattern, tmp_path / "out"))
        assert [part.path for unit in plan.units for part in unit.parts] == [
            f"memory:///remote/{name}" for name in names
        ]
    prepare(config("memory://remote/a", tmp_path / "out"), ONE)
    assert sorted(corpus_texts(tmp_path / "out")) == ["text of a/b/two.txt", "text of a/one.txt"]


def test_documents_without_eos_have_tokens_too(pages, tmp_path):
    from t5x_like.data.tokenizers import CharacterTokenizerConfig

    prepare(config(pages, tmp_path / "out", tokenizer=CharacterTokenizerConfig()), ONE)
    corpus = PreparedSource(directory=str(tmp_path / "out")).corpus(Split("document", 0.2))
    assert corpus.tokenizer.eos_id is None
    assert len(corpus.train.stream) + len(corpus.validation.stream) == np.sum(
        [len(text) for text in corpus_texts(tmp_path / "out")]
    ) + len(corpus.train.starts) + len(corpus.validation.starts)
