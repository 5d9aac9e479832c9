"""The examples of a task as tokens: made once, kept in files beside the tokenizer, mapped into memory."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt

from t5x_like.data.corpus import RECORD
from t5x_like.data.splits import Split, content_hash
from t5x_like.data.tasks.records import Record, SplitName
from t5x_like.data.tokenizers import Tokenizer, TokenizerConfig, read_tokenizer
from t5x_like.data.tokens import StreamWriter, map_stream, token_dtype
from t5x_like.errors import UserError
from t5x_like.files import fingerprint, prepare_once

if TYPE_CHECKING:
    from t5x_like.data.tasks.task import Task

_FORMAT = "examples 1"


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """The examples of one split.

    Attributes:
      streams: The tokens of each field, of all examples on end.
      ends: Behind how many tokens each example ends, [fields, examples].
      numbers: Labels and the like, by name.
      num_bytes: Size of all text in UTF-8.
      references: What answers are compared with, a line of JSON for each example; none of the training split.
    """

    streams: dict[str, UInt[np.ndarray, "tokens"]]
    ends: Int64[np.ndarray, "fields examples"]
    numbers: dict[str, Shaped[np.ndarray, "examples"]]
    num_bytes: int
    references: list[str]

    @property
    def num_documents(self) -> int:
        return self.ends.shape[1]

    def bounds(self, field: str) -> tuple[Int64[np.ndarray, "examples"], Int64[np.ndarray, "examples"]]:
        """Where the tokens of each example start in the field's stream, and how many there are."""
        ends = self.ends[list(self.streams).index(field)]
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        return starts, ends - starts

    def read_references(self) -> list[Any]:
        return [json.loads(line) for line in self.references]


@dataclasses.dataclass(frozen=True)
class ExampleCorpus:
    """Both splits of a task; `fingerprint` is a hash of their tokens and of the tokenizer."""

    tokenizer: Tokenizer
    train: ExampleSet
    validation: ExampleSet
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class SplitRecords:
    """The records of a task by split; every call reads them again."""

    task: "Task"
    split: Split

    def read(self, name: SplitName) -> Iterator[tuple[str, Record]]:
        if self.task.records.validation is not None:
            yield from self.task.read(name)
            return
        threshold = int(self.split.validation_fraction * 2**64)
        for place, record in self.task.read("train"):
            text = json.dumps(record, sort_keys=True, default=repr)
            if (content_hash(text) < threshold) == (name == "validation"):
                yield place, record

    def train(self) -> Iterator[str]:
        return self._texts("train")

    def all(self) -> Iterator[str]:
        yield from self._texts("train")
        yield from self._texts("validation")

    def _texts(self, name: SplitName) -> Iterator[str]:
        for place, record in self.read(name):
            yield from filter(None, self.task.texts_at(place, record))


def prepare_examples(
    task: "Task", tokenizer_config: TokenizerConfig, split: Split, directory: Path | None
) -> ExampleCorpus:
    """Tokenises the examples of a task, or loads what an earlier call made.

    Args:
      task: The task.
      tokenizer_config: Of the tokenizer; one that is trained learns from the training split.
      split: Which records validate, for a task that has no records for that.
      directory: Where the examples are kept; None keeps nothing.

    Raises:
      UserError: from the records or the tokenizer, if a split is empty, or if the directory cannot be written.
    """
    if split.by != "document" and task.records.validation is None:
        raise UserError(
            f"DataConfig.split={split.by!r}: records are split by their hashes; set it to 'document', or name the "
            f"records that validate in {type(task.records).__name__}.validation."
        )
    records = SplitRecords(task, split)
    key = repr((_FORMAT, task, task.records.cache_key(), tokenizer_config.cache_key(), split))
    make = lambda work: _write(records, tokenizer_config.build(records), work)
    return prepare_once(key, directory, make, lambda place: _load(task, place), f"{task}, {tokenizer_config}")


def _write(records: SplitRecords, tokenizer: Tokenizer, work: Path):
    tokenizer.save(work)
    record: dict[str, Any] = {"dtype": token_dtype(tokenizer.vocab_size)}
    for name in ("train", "validation"):
        record[name] = _write_split(records, name, tokenizer, work, record["dtype"])
        if not record[name]["examples"]:
            raise UserError(
                f"{records.task.records.name} has no records for {name}: check its files, or "
                "DataConfig.validation_fraction."
            )
    facts = [tokenizer.fingerprint(), *(record[name]["hashes"] for name in ("train", "validation"))]
    record["fingerprint"] = fingerprint(repr(facts))
    (work / RECORD).write_text(json.dumps(record, indent=1))


def _write_split(records: SplitRecords, name: SplitName, tokenizer: Tokenizer, work: Path, dtype: str) -> dict:
    task, num_bytes, ends, numbers = records.task, 0, [], []
    with contextlib.ExitStack() as stack:
        file = lambda path, mode: stack.enter_context(open(path, mode))
        streams = {f: StreamWriter(file(work / f"{name}.{f}.bin", "wb"), dtype) for f in task.field_names}
        references = file(work / f"{name}.jsonl", "w")
        for place, record in records.read(name):
            example = task.encode_at(place, record, tokenizer)
            for field, stream in streams.items():
                stream.write(example.fields[field])
            ends.append([stream.num_tokens for stream in streams.values()])
            numbers.append([example.numbers[number] for number in task.number_names])
            num_bytes += sum(len(text.encode()) for text in task.texts(record))
            if name == "validation":
                references.write(json.dumps(example.reference) + "\n")
    ends = np.array(ends, np.int64).reshape(-1, len(streams)).T
    np.save(work / f"{name}.npy", ends)
    columns = np.array(numbers, np.float64).reshape(len(numbers), len(task.number_names))
    hashes = [stream.digest.hexdigest() for stream in streams.values()]
    hashes.append(fingerprint(ends.tobytes() + columns.tobytes()))
    for number, column in enumerate(task.number_names):
        np.save(work / f"{name}.{column}.npy", columns[:, number].astype(task.number_dtype))
    return {"examples": len(numbers), "bytes": num_bytes, "hashes": hashes}


def _load(task: "Task", place: Path) -> ExampleCorpus:
    record = json.loads((place / RECORD).read_text())

    def load(name: SplitName) -> ExampleSet:
        ends = np.load(place / f"{name}.npy", mmap_mode="r")
        sizes = dict(zip(task.field_names, ends[:, -1].tolist(), strict=True))
        streams = {f: map_stream(place / f"{name}.{f}.bin", record["dtype"], size) for f, size in sizes.items()}
        numbers = {column: np.load(place / f"{name}.{column}.npy") for column in task.number_names}
        references = (place / f"{name}.jsonl").read_text().splitlines()
        return ExampleSet(streams, ends, numbers, record[name]["bytes"], references)

    return ExampleCorpus(read_tokenizer(place), load("train"), load("validation"), record["fingerprint"])
