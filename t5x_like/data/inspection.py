"""A batch made visible: what a model reads and predicts, token by token, for a terminal or a browser."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.text import Text

from t5x_like.data.objectives.objective import Rows
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.files import fingerprint
from t5x_like.page import Markup, element, facts, page

STREAMS = ("encoder", "decoder")
_TERMINAL = ("cyan", "yellow", "green", "magenta", "blue", "red")
_BROWSER = ("#1f77b4", "#b8860b", "#2e8b57", "#a0439b", "#c0504d", "#5b6abf")


class Token(NamedTuple):
    """A token of a row.

    Attributes:
      text: what it stands for, or the name of a special token.
      segment: of which piece of text it is, from 1.
      weight: of its loss; 0 where nothing is predicted.
      prediction: what is predicted in its place, if that is another token.
    """

    text: str
    segment: int
    weight: float
    prediction: str = ""


class Stream(NamedTuple):
    """The tokens of one side of the model in a row; padding is left out, and counted."""

    name: str
    tokens: list[Token]
    num_padding: int


class BatchView:
    """The rows of a batch as tokens, and figures about all of it."""

    def __init__(self, batch: Rows, tokenizer: Tokenizer):
        """Looks at a batch.

        Args:
          batch: features by T5X's names.
          tokenizer: the one that made it.
        """
        self._batch, self._pad = batch, tokenizer.pad_id or 0
        self._names = token_names(tokenizer)
        self.num_rows = len(next(iter(batch.values())))
        self.streams = [name for name in STREAMS if f"{name}_input_tokens" in batch]

    def row(self, number: int) -> list[Stream]:
        """The streams of a row."""
        return [self._stream(name, number) for name in self.streams]

    def labels(self, number: int) -> dict[str, float]:
        """The features of a row that have one value."""
        return {name: float(values[number]) for name, values in self._batch.items() if values.ndim == 1}

    def facts(self) -> dict[str, str]:
        """Figures about the batch, by name."""
        facts = {}
        for name in self.streams:
            used = [self._length(name, row) for row in range(self.num_rows)]
            length = self._batch[f"{name}_input_tokens"].shape[1]
            facts[f"{name} tokens"] = (
                f"{self.num_rows} x {length}, {sum(used) / (self.num_rows * length):.1%} filled (the rest is padding)"
            )
            segments = self._batch.get(f"{name}_segment_ids")
            if segments is not None:
                facts[f"{name} pieces per row"] = f"{segments.max(axis=1).mean():.1f}"
            weights = self._batch.get(f"{name}_loss_weights")
            if weights is not None:
                facts[f"{name} predicted"] = f"{np.count_nonzero(weights):,} of {sum(used):,} tokens"
        facts["features"] = ", ".join(f"{n} {v.dtype} {list(v.shape)}" for n, v in sorted(self._batch.items()))
        content = b"".join(name.encode() + values.tobytes() for name, values in sorted(self._batch.items()))
        facts["hash"] = fingerprint(content, size=8)
        return facts

    def _length(self, name: str, row: int) -> int:
        """Tokens of a row up to the last that is no padding."""
        used = self._batch[f"{name}_input_tokens"][row] != self._pad
        for feature in ("segment_ids", "loss_weights"):
            if f"{name}_{feature}" in self._batch:
                used |= self._batch[f"{name}_{feature}"][row] > 0
        return int(np.flatnonzero(used).max(initial=-1)) + 1

    def _stream(self, name: str, row: int) -> Stream:
        length, inputs = self._length(name, row), self._batch[f"{name}_input_tokens"][row]
        targets = self._batch.get(f"{name}_target_tokens", self._batch[f"{name}_input_tokens"])[row]
        weights = self._batch.get(f"{name}_loss_weights", np.zeros((self.num_rows, len(inputs))))[row]
        segments = self._batch.get(f"{name}_segment_ids", np.ones((self.num_rows, len(inputs)), np.int32))[row]
        # A decoder's target is the next token of the same text: it is enough to show that.
        shown = targets if name == "decoder" else inputs
        tokens = [
            Token(
                self._names[shown[i]],
                int(segments[i]),
                float(weights[i]),
                self._names[targets[i]] if weights[i] and targets[i] != shown[i] else "",
            )
            for i in range(length)
        ]
        return Stream(name, tokens, len(inputs) - length)


def token_names(tokenizer: Tokenizer) -> list[str]:
    """What each id stands for: its text (in hexadecimal where its bytes are none by themselves), or its name."""
    names = [raw.decode(errors="backslashreplace") for raw in tokenizer.token_bytes()]
    for name in ("pad", "eos", "bos", "unk"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and not names[number]:
            names[number] = f"<{name}>"
    for name, number in tokenizer.special_ids.items():
        names[number] = name
    return [name or f"<{number}>" for number, name in enumerate(names)]


def terminal(view: BatchView, rows: range) -> Iterator[Text]:
    """Lines for a terminal: colours tell pieces apart, dim tokens are not predicted, `>` leads to what is."""
    for name, value in view.facts().items():
        yield Text.assemble((f"{name}: ", "bold"), value)
    for row in rows:
        for stream in view.row(row):
            yield Text(f"\nrow {row}, {stream.name}", "bold")
            line = Text()
            for token in stream.tokens:
                colour = _TERMINAL[(token.segment - 1) % len(_TERMINAL)]
                line.append(token.text, colour if token.weight else f"{colour} dim")
                if token.prediction:
                    line.append(f">{token.prediction}", "bold reverse")
            yield line.append(f" + {stream.num_padding} of padding", "dim")
        if labels := view.labels(row):
            yield Text(", ".join(f"{name} {value:g}" for name, value in labels.items()))


def browser(view: BatchView, rows: range, title: str) -> str:
    """A page of these rows; tokens that are predicted are underlined."""
    parts = [element("h1", title), facts(view.facts())]
    for row in rows:
        for stream in view.row(row):
            padding = element("i", f" + {stream.num_padding} of padding", kind="dim")
            tokens = (part for token in stream.tokens for part in _spans(token))
            parts += [element("h2", f"row {row}, {stream.name}"), element("p", *tokens, padding, kind="tokens")]
        if labels := view.labels(row):
            parts.append(element("p", ", ".join(f"{name} {value:g}" for name, value in labels.items())))
    return page(title, parts)


def _spans(token: Token) -> Iterator[Markup]:
    colour = _BROWSER[(token.segment - 1) % len(_BROWSER)]
    hint = f"piece {token.segment}, weight {token.weight:g}"
    yield element("span", token.text, kind="in" if token.weight else "out", style=f"color:{colour}", title=hint)
    if token.prediction:
        yield element("b", token.prediction)
