"""How the examples of a task are placed in rows: random access by row number."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64, Shaped

from t5x_like.data.layouts import Layout, best_fit, best_fit_sides
from t5x_like.data.pieces import Pieces, Ragged, ragged_arange
from t5x_like.data.tasks.examples import ExampleSet

Lengths = dict[str, Int64[np.ndarray, "examples"]]


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of some rows.

    Attributes:
      source: of the split.
      example: the number of each.
      rows: the row of each, ascending.
      num_rows: the number of rows.
    """

    source: ExampleSet
    example: Int64[np.ndarray, "pieces"]
    rows: Int64[np.ndarray, "pieces"]
    num_rows: int

    def field(self, name: str) -> Ragged:
        """The tokens of a field, all of them."""
        starts, lengths = (values[self.example] for values in self.source.bounds(name))
        pieces = Pieces(self.rows, lengths, self.num_rows)
        places = np.repeat(starts - pieces.begins, lengths) + np.arange(len(pieces.of))
        return Ragged(pieces, self.source.streams[name][places].astype(np.int32))

    def number(self, name: str) -> Shaped[np.ndarray, "pieces"]:
        return self.source.numbers[name][self.example]


class ExampleRows(Layout):
    """One example per row, or several that do not see each other.

    Attributes:
      num_rows: Rows that hold every example once.
      num_tokens: Tokens of all examples that are read.
      tokens_per_row: On average.
      num_cut: Examples that are too long for a row and lose some of their tokens.
    """

    def __init__(
        self,
        source: ExampleSet,
        sizes: Callable[[Lengths], Sequence[Int64[np.ndarray, "examples"]]],
        capacities: Sequence[int],
        packed: bool,
    ):
        """Plans the rows.

        Args:
          source: The examples.
          sizes: The room that each example wants in each of the rows that a model reads, by the lengths of its fields.
          capacities: The room that there is.
          packed: Whether several may share a row.
        """
        self.source = source
        wanted = sizes({name: source.bounds(name)[1] for name in source.streams})
        used = [np.minimum(want, room) for want, room in zip(wanted, capacities, strict=True)]
        row = _row_of(used, capacities) if packed else np.arange(source.num_documents)
        self.num_tokens = int(sum(size.sum() for size in used))
        self.num_rows = int(row.max(initial=-1)) + 1
        self.tokens_per_row = self.num_tokens / max(self.num_rows, 1)
        self.num_cut = int(np.any([want > size for want, size in zip(wanted, used, strict=True)], axis=0).sum())
        self._order = np.argsort(row, kind="stable")
        # The examples of row i are those from row_bounds[i] to row_bounds[i + 1]; an empty row follows the last.
        self._row_bounds = np.searchsorted(row[self._order], np.arange(self.num_rows + 2))

    def read(self, index: Int64[np.ndarray, "rows"]) -> Examples:
        """The examples of the rows of these numbers; numbers from `num_rows` on have none."""
        index = np.minimum(index, self.num_rows)
        counts = self._row_bounds[index + 1] - self._row_bounds[index]
        rows, number = ragged_arange(counts)
        return Examples(self.source, self._order[self._row_bounds[index][rows] + number], rows, len(index))


def _row_of(sizes: Sequence[Int64[np.ndarray, "examples"]], capacities: Sequence[int]) -> Int64[np.ndarray, "examples"]:
    if len(sizes) == 1:
        return best_fit(sizes[0], capacities[0])
    return best_fit_sides(np.stack(sizes, axis=1), np.array(capacities))


class WindowRows(Layout):
    """A question and a window of its context per row: long contexts have several rows, side by side in number.

    Attributes:
      example: The example of each row.
      starts: The first token of the context that the row holds.
      questions: How many tokens of the question it holds.
    """

    def __init__(self, source: ExampleSet, length: int, stride: int):
        self.source, self.length = source, length
        questions, contexts = (source.bounds(name)[1] for name in ("first", "second"))
        questions = np.minimum(questions, length // 4)
        room = length - 3 - questions
        step = np.minimum(stride, room)
        counts = 1 + -(-np.maximum(contexts - room, 0) // step)
        self.example, number = ragged_arange(counts)
        self.starts = number * step[self.example]
        self.questions = questions[self.example]
        self.num_rows = len(self.example)
        self.num_tokens = int((np.minimum(contexts[self.example] - self.starts, room[self.example])).sum())
        self.tokens_per_row = self.num_tokens / max(self.num_rows, 1)

    def read(self, index: Int64[np.ndarray, "rows"]) -> tuple[Examples, Int64[np.ndarray, "pieces"]]:
        """The examples of rows, and the numbers of those that have one; numbers from `num_rows` on have none."""
        rows = np.flatnonzero(index < self.num_rows)
        return Examples(self.source, self.example[index[rows]], rows, len(index)), index[rows]
