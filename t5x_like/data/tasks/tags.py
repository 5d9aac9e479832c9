"""A class for each word of a text: names, parts of speech (Devlin et al. 2019, section 5.3)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from t5x_like.configurable import configurable
from t5x_like.data.tasks.layouts import ExampleRows
from t5x_like.data.tasks.records import Record, Records
from t5x_like.data.tasks.task import Example, Metric, Task, class_number
from t5x_like.data.tasks.templates import value_of
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError


@configurable
class TagTask(Task):
    """A class for each word: the word's first token has it, its other tokens have none.

    Attributes:
      records: The records.
      words: The value that is the list of words.
      tags: The value that is the list of their classes: numbers from 0, or some of `labels`.
      labels: Names of the classes, in the order of their numbers.
      metrics: How the predicted classes of all words are scored.
    """

    records: Records
    words: str = "words"
    tags: str = "tags"
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...] = ("accuracy",)

    writes = False
    # Of each token of the words: 0, or 1 more than its class.
    field_names = ("words", "classes")

    def __post_init__(self):
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"TagTask.labels={self.labels!r}: name at least two classes, each once.")

    def texts(self, record: Record) -> list[str]:
        # White space belongs to what follows it.
        return [f" {word}" if number else str(word) for number, word in enumerate(value_of(self.words, record))]

    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        words, tags = self.texts(record), value_of(self.tags, record)
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} words have {len(tags)} tags")
        numbers = [class_number({self.tags: tag}, self.tags, len(self.labels), self.labels) for tag in tags]
        encoded = tokenizer.encode_batch(words)
        first_of = lambda tokens: np.arange(len(tokens)) == 0
        classes = [first_of(tokens) * (number + 1) for tokens, number in zip(encoded, numbers, strict=True)]
        joined = lambda parts: np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
        fields = {"words": joined(encoded), "classes": joined(classes)}
        return Example(fields, {}, [n for tokens, n in zip(encoded, numbers, strict=True) if len(tokens)])

    def predicted(
        self, outputs: Float[np.ndarray, "rows length classes"], layout: ExampleRows, tokenizer: Tokenizer
    ) -> list[int]:
        """The class of each word of all examples; -1 for what has no room in a row."""
        classes = layout.read(np.arange(layout.num_rows)).field("classes")
        here, length = np.flatnonzero(classes.values), outputs.shape[1]
        row, place = classes.pieces.rows[classes.pieces.of[here]], classes.pieces.position[here] + 1
        best = outputs.argmax(axis=-1)[row, np.minimum(place, length - 1)]
        return np.where(place < length - 1, best, -1).tolist()

    def right(self, references: Sequence[list[int]]) -> list[int]:
        return [number for numbers in references for number in numbers]
