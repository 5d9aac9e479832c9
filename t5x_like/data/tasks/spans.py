"""Questions whose answer is a piece of a given text (SQuAD; Devlin et al. 2019, section 4.2)."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Int64

from t5x_like.configurable import configurable
from t5x_like.data.tasks.layouts import WindowRows
from t5x_like.data.tasks.records import Record, Records
from t5x_like.data.tasks.task import Example, Metric, Task
from t5x_like.data.tasks.templates import fill, value_of
from t5x_like.data.tokenizers import Tokenizer

# White space belongs to what follows it; marks stand alone, so that an answer's end is the end of a word.
_WORD = re.compile(r"\s*(?:\w+|[^\w\s])")

MAX_ANSWER_TOKENS = 30


class Words(NamedTuple):
    """A text word by word.

    Attributes:
      ends: where each word ends, in characters.
      tokens: of all words.
      token_ends: behind how many tokens each word ends.
    """

    ends: Int64[np.ndarray, "words"]
    tokens: Int32[np.ndarray, "tokens"]
    token_ends: Int64[np.ndarray, "words"]


def words_of(text: str, tokenizer: Tokenizer) -> Words:
    """The words of a text, each encoded by itself: it is known where in the text a token stands, for any tokenizer."""
    matches = list(_WORD.finditer(text))
    encoded = tokenizer.encode_batch([match[0] for match in matches])
    ends = np.array([match.end() for match in matches], np.int64)
    token_ends = np.cumsum([len(tokens) for tokens in encoded], dtype=np.int64)
    return Words(ends, np.concatenate([np.zeros(0, np.int32), *encoded]), token_ends)


def answer_text(context: str, tokenizer: Tokenizer, first: int, last: int) -> str:
    """The text of the tokens from `first` to `last` of the context: whole words."""
    words = words_of(context, tokenizer)
    begin, end = np.searchsorted(words.token_ends, [first, last], side="right")
    starts = np.append(0, words.ends)
    return context[starts[begin] : words.ends[min(end, len(words.ends) - 1)]].strip()


@configurable
class SpanTask(Task):
    """The answer to a question is a piece of the context.

    Questions without an answer point to the first token of the row, [CLS] (SQuAD 2; Devlin et al. 2019, section 4.3).

    Attributes:
      records: The records.
      question: Template of the question.
      context: The value that is the text with the answer.
      answers: The value that holds the texts of the answers that are right; the first is learned.
      starts: The value that holds where they begin in the context, in characters.
      metrics: How predicted answers are scored.
    """

    records: Records
    question: str = "{question}"
    context: str = "context"
    answers: str = "answers[text]"
    starts: str = "answers[answer_start]"
    metrics: tuple[Metric, ...] = ("exact_match", "token_f1")

    writes = False
    field_names = ("first", "second")
    # Tokens of the context; -1: there is no answer.
    number_names = ("span_starts", "span_ends")

    def texts(self, record: Record) -> list[str]:
        return [fill(self.question, record), value_of(self.context, record)]

    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        question, context = self.texts(record)
        answers, starts = list(value_of(self.answers, record)), list(value_of(self.starts, record))
        words = words_of(context, tokenizer)
        first = last = -1
        if answers:
            begin, end = starts[0], starts[0] + len(answers[0])
            if context[begin:end] != answers[0]:
                raise ValueError(f"the answer {answers[0]!r} does not stand at character {begin} of {self.context}")
            from_word = int(np.searchsorted(words.ends, begin, side="right"))
            to_word = int(np.searchsorted(words.ends, end, side="left"))
            first = int(np.append(0, words.token_ends)[from_word])
            last = int(words.token_ends[min(to_word, len(words.token_ends) - 1)]) - 1
        fields = {"first": tokenizer.encode(question), "second": words.tokens}
        reference = {"context": context, "answers": answers or [""]}
        return Example(fields, {"span_starts": first, "span_ends": last}, reference)

    def predicted(
        self, outputs: Float[np.ndarray, "rows length 2"], layout: WindowRows, tokenizer: Tokenizer
    ) -> list[str]:
        """The best span of all windows of each example, or no text where [CLS] scores more in every one.

        (Devlin et al. 2019, section 4.3, with a threshold of 0.)
        """
        references = layout.source.read_references()
        best = [(-np.inf, 0, 0)] * len(references)
        none = np.full(len(references), np.inf)
        _, contexts = layout.source.bounds("second")
        for row, (example, start) in enumerate(zip(layout.example.tolist(), layout.starts.tolist(), strict=True)):
            shift = 2 + int(layout.questions[row])
            last = shift + min(int(contexts[example]) - start, outputs.shape[1] - shift - 1) - 1
            none[example] = min(none[example], float(outputs[row, 0].sum()))
            if last >= shift:
                value, begin, end = best_span(outputs[row], shift, last)
                best[example] = max(best[example], (value, begin - shift + start, end - shift + start))
        return [
            answer_text(references[i]["context"], tokenizer, begin, end) if value > none[i] else ""
            for i, (value, begin, end) in enumerate(best)
        ]

    def right(self, references: Sequence[dict]) -> list[list[str]]:
        return [reference["answers"] for reference in references]


def best_span(scores: Float[np.ndarray, "length 2"], first: int, last: int) -> tuple[float, int, int]:
    """The score and the ends of the span between two tokens whose ends score most, no longer than 30 tokens."""
    starts, ends = scores[first : last + 1, 0], scores[first : last + 1, 1]
    sums = starts[:, None] + ends[None, :]
    place = np.arange(len(starts))
    distance = place[None, :] - place[:, None]
    sums = np.where((distance >= 0) & (distance < MAX_ANSWER_TOKENS), sums, -np.inf)
    begin, end = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[begin, end]), first + int(begin), first + int(end)
