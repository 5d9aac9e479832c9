"""What all tasks are: records, what is made of each, and how answers are scored."""

import abc
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from t5x_like.data.tasks.records import HuggingFaceRecords, JsonRecords, Record, Records, SplitName, TfdsRecords
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError

AnyRecords = JsonRecords | HuggingFaceRecords | TfdsRecords | Records
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


class Task(abc.ABC):
    """What every task's configuration can do.

    Attributes:
      records: Its records.
      metrics: How answers to the validation split are scored.
      field_names: The fields of its examples.
      number_names: The numbers of its examples.
      number_dtype: Their dtype.
    """

    records: AnyRecords
    metrics: tuple[Metric, ...]
    field_names: tuple[str, ...]
    number_names: tuple[str, ...] = ()
    number_dtype: str = "int32"

    @abc.abstractmethod
    def texts(self, record: Record) -> list[str]:
        """All text of a record, for tokenizers to learn from."""

    @abc.abstractmethod
    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        """The example of a record; LookupError, TypeError or ValueError if it is not as it should be."""

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
