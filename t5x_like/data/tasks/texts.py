"""Text in, text out: every task as T5 poses it (Raffel et al. 2020, section 2.4)."""

from t5x_like.configurable import configurable
from t5x_like.data.tasks.records import Record, Records
from t5x_like.data.tasks.task import Example, Metric, Task, named_label
from t5x_like.data.tasks.templates import check_template, fill, value_of
from t5x_like.data.tokenizers import Tokenizer


@configurable
class TextToTextTask(Task):
    """Templates make an input and a target of each record: `'sst2 sentence: {sentence}'` and `'{label}'`.

    Attributes:
      records: The records.
      inputs: Template of the input.
      targets: Template of the target.
      labels: Names of classes: `{label}` is the name of the class that a record gives by its number.
      label_field: Which value that is.
      references: The value that holds all answers that are right, e.g. `answers[text]`; None: the target alone.
      metrics: How what the model writes is compared with them.
    """

    records: Records
    inputs: str
    targets: str
    labels: tuple[str, ...] = ()
    label_field: str = "label"
    references: str | None = None
    metrics: tuple[Metric, ...] = ("exact_match",)

    field_names = ("inputs", "targets")

    def __post_init__(self):
        check_template("TextToTextTask.inputs", self.inputs)
        check_template("TextToTextTask.targets", self.targets)

    def texts(self, record: Record) -> list[str]:
        if self.labels:
            record = named_label(record, self.label_field, self.labels)
        return [fill(self.inputs, record), fill(self.targets, record)]

    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        texts = self.texts(record)
        accepted = [texts[1]]
        if self.references is not None:
            # A record without any, a question without an answer, keeps its target.
            accepted = [str(answer) for answer in value_of(self.references, record)] or accepted
        return Example(dict(zip(self.field_names, tokenizer.encode_batch(texts), strict=True)), {}, accepted)
