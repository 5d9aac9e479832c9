"""A class or a number for a text, or for two: what BERT's heads are fine-tuned on (Devlin et al. 2019, section 4.1)."""

import numpy as np
from jaxtyping import Float

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout
from t5x_like.data.tasks.records import Record, Records
from t5x_like.data.tasks.task import Example, Metric, Task, class_number
from t5x_like.data.tasks.templates import check_template, fill
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError


class _LabelTask(Task):
    """Texts of which the second may be left out, `second=''`."""

    first: str
    second: str

    field_names = ("first", "second")

    def __post_init__(self):
        check_template(f"{type(self).__name__}.first", self.first)
        if self.second:
            check_template(f"{type(self).__name__}.second", self.second)

    def texts(self, record: Record) -> list[str]:
        return [fill(self.first, record), fill(self.second, record)]

    def _fields(self, record: Record, tokenizer: Tokenizer) -> dict:
        return dict(zip(self.field_names, tokenizer.encode_batch(self.texts(record)), strict=True))


@configurable
class ClassificationTask(_LabelTask):
    """A class for a text, or for two.

    Attributes:
      records: The records.
      first: Template of the text, e.g. `{sentence}`.
      second: Template of the second text; empty: there is none.
      label: The value that is the class: a number from 0, or one of `labels`.
      labels: Names of the classes, in the order of their numbers.
      metrics: How predicted classes are scored; `f1` and `matthews` take class 1 for the one to be found.
    """

    records: Records
    first: str
    second: str = ""
    label: str = "label"
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...] = ("accuracy",)

    writes = False
    number_names = ("labels",)

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"ClassificationTask.labels={self.labels!r}: name at least two classes, each once.")

    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        number = class_number(record, self.label, len(self.labels), self.labels)
        return Example(self._fields(record, tokenizer), {"labels": number}, number)

    def predicted(self, outputs: Float[np.ndarray, "rows classes"], layout: Layout, tokenizer: Tokenizer) -> list[int]:
        return outputs.argmax(axis=-1).tolist()


@configurable
class RegressionTask(_LabelTask):
    """A number for a text, or for two.

    Attributes:
      records: The records.
      first: Template of the text.
      second: Template of the second text; empty: there is none.
      target: The value that is the number.
      metrics: How predicted numbers are scored.
    """

    records: Records
    first: str
    second: str = ""
    target: str = "label"
    metrics: tuple[Metric, ...] = ("pearson", "spearman")

    writes = False
    number_names = ("targets",)
    number_dtype = "float32"

    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        number = float(record[self.target])
        return Example(self._fields(record, tokenizer), {"targets": number}, number)

    def predicted(self, outputs: Float[np.ndarray, "rows"], layout: Layout, tokenizer: Tokenizer) -> list[float]:
        return outputs.tolist()
