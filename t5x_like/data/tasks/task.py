"""What all tasks are: records, what is made of each, and how answers are scored."""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from t5x_like.data.layouts import Layout
from t5x_like.data.sources import Source
from t5x_like.data.splits import Split
from t5x_like.data.tasks.examples import ExampleCorpus, prepare_examples
from t5x_like.data.tasks.records import Record, Records, SplitName
from t5x_like.data.tokenizers import Tokenizer, TokenizerConfig
from t5x_like.errors import UserError

Metric = Literal[
    "accuracy",
    "f1",
    "macro_f1",
    "matthews",
    "pearson",
    "spearman",
    "exact_match",
    "token_f1",
    "bleu",
    "rouge",
]
"""See `evaluation.metrics`."""


class Example(NamedTuple):
    """A record made ready.

    Attributes:
      fields: Tokens by name.
      numbers: Labels and the like by name.
      reference: What its answer is compared with: a value that JSON can hold.
    """

    fields: dict[str, Int32[np.ndarray, "tokens"]]
    numbers: dict[str, float]
    reference: Any


class Task(Source):
    """Records, the examples that are made of them, and how answers to these are scored.

    Attributes:
      records: Its records.
      metrics: How answers to the validation split are scored.
      labels: Names of the classes, in the order of their numbers, where answers are classes.
      writes: Whether an answer is what the model writes; otherwise it is read off the outputs of the model's head.
      field_names: The fields of its examples.
      number_names: The numbers of its examples.
      number_dtype: Their dtype.
    """

    records: Records
    metrics: tuple[Metric, ...]
    labels: tuple[str, ...] = ()
    writes: bool = True
    field_names: tuple[str, ...]
    number_names: tuple[str, ...] = ()
    number_dtype: str = "int32"

    @abc.abstractmethod
    def texts(self, record: Record) -> list[str]:
        """All text of a record, for tokenizers to learn from."""

    @abc.abstractmethod
    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        """The example of a record; LookupError, TypeError or ValueError if it is not as it should be."""

    def predicted(self, outputs: Any, layout: Layout, tokenizer: Tokenizer) -> list[Any]:
        """What the model says to each example; `outputs` are its texts, or its head's outputs for each of the rows."""
        return list(outputs)

    def right(self, references: Sequence[Any]) -> list[Any]:
        """What is right for each example."""
        return list(references)

    @property
    def name(self) -> str:
        return self.records.name

    @property
    def tasks(self) -> "tuple[Task, ...]":
        return (self,)

    def corpora(
        self, split: Split, tokenizer: TokenizerConfig | None, directory: Path | None
    ) -> tuple[ExampleCorpus, ...]:
        assert tokenizer is not None, "DataConfig sees to it"
        return (prepare_examples(self, tokenizer, split, directory),)

    def read(self, split: SplitName) -> Iterator[tuple[str, Record]]:
        """Yields (place, record) of a split."""
        for number, record in enumerate(self.records.read(split), start=1):
            yield f"{self.records.name}, {split} record {number}", record

    def texts_at(self, place: str, record: Record) -> list[str]:
        """As `texts`; UserError, which names the place."""
        try:
            return self.texts(record)
        except (LookupError, TypeError, ValueError) as error:
            raise _unfit(self, place, record, error) from error

    def encode_at(self, place: str, record: Record, tokenizer: Tokenizer) -> Example:
        """As `encode`; UserError, which names the place."""
        try:
            return self.encode(record, tokenizer)
        except (LookupError, TypeError, ValueError) as error:
            raise _unfit(self, place, record, error) from error


def _unfit(task: Task, place: str, record: Record, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    what = f"no value {error}" if isinstance(error, LookupError) else str(error)
    return UserError(f"{place} does not fit {type(task).__name__}: {what}. It has {', '.join(record) or 'no values'}.")


def named_label(record: Record, field: str, labels: tuple[str, ...]) -> Record:
    """The record with the name of its class in place of the number."""
    return {**record, field: labels[class_number(record, field, len(labels), labels)]}


def class_number(record: Record, field: str, count: int, labels: tuple[str, ...] = ()) -> int:
    """The class of a record, which gives it as a number or by name; ValueError for any other value."""
    value = record[field]
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if not isinstance(value, int | bool) or not 0 <= value < count:
        names = f", or one of {', '.join(labels)}" if labels else ""
        raise ValueError(f"{field} is {value!r}, not a class from 0 to {count - 1}{names}")
    return int(value)
