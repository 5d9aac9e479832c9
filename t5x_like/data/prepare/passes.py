"""The passes over a corpus: each is a function of one unit of work that leaves its files in the work directory.

A unit whose files are there is done: a preparation that was stopped goes on, and the number of processes, or the engine
that runs them, changes nothing. Memory is bounded by one document at a time, and by numbers, 50 bytes for each document
of a unit and 8 for each of its lines; `deduplicate` says what the pass over all units takes.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t5x_like.data.prepare.config import Deduplication, PrepareConfig
from t5x_like.data.prepare.document import Document, Dropped
from t5x_like.data.prepare.readers import Problem, Record, read_part
from t5x_like.data.prepare.signatures import line_hashes, signature, without_repeated_lines
from t5x_like.data.prepare.tally import Tally
from t5x_like.data.prepare.work import Unit, read_lines, write_json, write_lines
from t5x_like.data.shards import TOKENIZER, ShardWriter
from t5x_like.data.splits import content_hash
from t5x_like.data.tokenizers import read_tokenizer
from t5x_like.files import new_file

KEPT, DUPLICATE, NEAR_DUPLICATE = range(3)
_VERDICTS = {DUPLICATE: "duplicate", NEAR_DUPLICATE: "near duplicate"}


def name(kind: str, number: int, suffix: str) -> str:
    return f"{kind}-{number:05}{suffix}"


def clean(unit: Unit, config: PrepareConfig, work: Path):
    """Reads, extracts and cleans the documents of a unit, and hashes what is left.

    Writes `text-N.jsonl.gz`, `hashes-N.npz` for deduplication and, last, the counts `clean-N.json`.
    """
    done = work / name("clean", unit.number, ".json")
    if done.exists():
        return
    tally, hashes = Tally(), _Hashes(config.deduplication)

    def lines() -> Iterator[dict[str, str]]:
        for document in cleaned(unit, config, tally):
            hashes.add(document.text)
            yield document._asdict()

    write_lines(work / name("text", unit.number, ".jsonl.gz"), lines())
    with new_file(work / name("hashes", unit.number, ".npz")) as aside:
        np.savez(aside, **hashes.arrays())
    write_json(done, tally.to_json())


def cleaned(unit: Unit, config: PrepareConfig, tally: Tally) -> Iterator[Document]:
    """Yields the documents of a unit that pass all stages, and counts what happens to all of them."""
    for part in unit.parts:
        for record in read_part(part, config.reading):
            document = extracted(record, part.source, config, tally)
            for stage in config.stages if document else ():
                document = _passed(stage, document, tally)
                if document is None:
                    break
            if document:
                tally.observe("characters of clean documents", len(document.text))
                yield document


def extracted(record: Record | Problem, source: str, config: PrepareConfig, tally: Tally) -> Document | None:
    """The text of a record; None if it has none."""
    tally.count(source, "read", "found", documents=1)
    if isinstance(record, Problem):
        tally.fail("read", record.reason, source, record.place, record.details)
        return None
    tally.count(source, "read", "found", bytes=len(record.content))
    found = config.html.text(record)
    if isinstance(found, Dropped):
        tally.fail("extract", found.reason, source, record.place)
        return None
    text, replaced = found
    tally.count(source, "extract", "bytes that are not text", places=replaced)
    if not text:
        tally.fail("extract", "empty", source, record.place)
        return None
    document = Document(text, record.place, source)
    tally.keep("extract", document)
    tally.observe("characters of extracted documents", len(text))
    return document


def _passed(stage, document: Document, tally: Tally) -> Document | None:
    label = type(stage).__name__
    result = stage.process(document)
    if isinstance(result, Dropped):
        tally.drop(label, result.reason, document)
        return None
    tally.keep(label, result)
    if result.text != document.text:
        tally.count(document.source, label, "changed", documents=1)
    return result


class _Hashes:
    """What deduplication needs to know of a unit's documents."""

    def __init__(self, config: Deduplication):
        self._config = config
        self._texts: list[int] = []
        self._bands: list[np.ndarray] = []
        self._bits: list[np.ndarray] = []
        self._lines: list[np.ndarray] = []

    def add(self, text: str):
        self._texts.append(content_hash(text))
        if self._config.near:
            bands, bits = signature(text, self._config.near)
            self._bands.append(bands)
            self._bits.append(bits)
        if self._config.lines:
            self._lines.append(line_hashes(text.split("\n"), self._config.min_line_letters))

    def arrays(self) -> dict[str, np.ndarray]:
        """`texts` [documents], `bands` [bands, documents], `bits` [documents, hashes], `lines` [lines], `num_lines`."""
        arrays = {"texts": np.array(self._texts, np.uint64)}
        if near := self._config.near:
            arrays["bands"] = np.array(self._bands, np.uint64).reshape(-1, near.num_bands).T
            arrays["bits"] = np.array(self._bits, np.uint8).reshape(-1, near.num_bands * near.rows_per_band)
        if self._config.lines:
            arrays["lines"] = np.concatenate([np.zeros(0, np.uint64), *self._lines])
            arrays["num_lines"] = np.array([len(lines) for lines in self._lines], np.int64)
        return arrays


def tokenize(unit: Unit, config: PrepareConfig, work: Path, directory: Path, num_units: int):
    """Writes the shard of a unit from the documents that deduplication keeps and, last, the counts `tokens-N.json`."""
    done = work / name("tokens", unit.number, ".json")
    if done.exists():
        return
    tally = Tally()
    tokenizer = _tokenizer(directory / TOKENIZER)
    writer = ShardWriter(work / f"{unit.number:05}-of-{num_units:05}", tokenizer)
    unknown = tokenizer.unk_id

    def documents() -> Iterator[Document]:
        for document in kept_documents(unit, config, work, tally):
            tokens = writer.write(document.text)
            tally.observe("tokens of documents", len(tokens))
            tally.count(
                document.source,
                "tokenize",
                "kept",
                documents=1,
                characters=len(document.text),
                bytes=len(document.text.encode()),
                words=len(document.text.split()),
                tokens=len(tokens),
                unknown=0 if unknown is None else int((tokens == unknown).sum()),
            )
            yield document

    if config.keep_text:
        text = directory / "text"
        text.mkdir(exist_ok=True)
        write_lines(text / f"{unit.number:05}.jsonl.gz", (document._asdict() for document in documents()))
    else:
        for _ in documents():
            pass
    shard = writer.close()
    for suffix in (".array_record", ".npy"):
        file = work / f"{shard.name}{suffix}"
        file.rename(directory / file.name) if shard.documents else file.unlink()
    write_json(done, {"shard": shard._asdict(), "tally": tally.to_json()})


def kept_documents(unit: Unit, config: PrepareConfig, work: Path, tally: Tally | None = None) -> Iterator[Document]:
    """Yields the documents of a unit that deduplication keeps, without lines that it takes away."""
    tally = Tally() if tally is None else tally
    min_letters = config.deduplication.min_line_letters
    verdicts = np.load(work / name("verdicts", unit.number, ".npz"))
    lines = iter(verdicts["lines"].tolist())
    texts = read_lines(work / name("text", unit.number, ".jsonl.gz"))
    for fields, verdict in zip(texts, verdicts["documents"].tolist(), strict=True):
        document = Document(**fields)
        text = document.text
        if config.deduplication.lines:
            text = without_repeated_lines(text, min_letters, lines)
        if verdict != KEPT:
            tally.drop("deduplicate", _VERDICTS[verdict], document)
        elif not text:
            tally.drop("deduplicate", "nothing but repeated lines", document)
        else:
            tally.count(
                document.source, "deduplicate", "repeated lines taken away", characters=len(document.text) - len(text)
            )
            document = document._replace(text=text)
            tally.keep("deduplicate", document)
            yield document


_tokenizer = functools.cache(read_tokenizer)
