"""How a token stream is placed in rows: random access by row number.

A layout knows only text. What a model learns from it, and with which features, is the objective's
(`data.objectives`), which also says how much text has room in a row.
"""

import abc
import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64, UInt, UInt64

from t5x_like.data.pieces import Pieces, ragged_arange
from t5x_like.data.randomness import below
from t5x_like.data.tokens import Tokens

_OPEN_ROWS = 512

LayoutName = Literal["concatenate", "pack", "documents", "random_windows"]
"""How rows are made of documents: see `DataConfig.layout`."""

Costs = Callable[[Int64[np.ndarray, "pieces"]], Int64[np.ndarray, "pieces"]]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text of some rows: pieces of the stream.

    Attributes:
      stream: all tokens of the split.
      starts: where each piece begins in the stream; a token stands before it.
      pieces: their rows and lengths; a layout gives no piece without tokens.
    """

    stream: UInt[np.ndarray, "stream"]
    starts: Int64[np.ndarray, "pieces"]
    pieces: Pieces

    def part(self, starts: Int64[np.ndarray, "pieces"], lengths: Int64[np.ndarray, "pieces"]) -> "Text":
        """Other pieces of the stream in the same rows."""
        return Text(self.stream, starts, self.pieces.resized(lengths))

    @cached_property
    def tokens(self) -> Int32[np.ndarray, "tokens"]:
        """The tokens of all pieces, on end."""
        return self.stream[self._source].astype(np.int32)

    @cached_property
    def before(self) -> Int32[np.ndarray, "tokens"]:
        """The token that stands before each in the stream."""
        return self.stream[self._source - 1].astype(np.int32)

    @cached_property
    def _source(self) -> Int64[np.ndarray, "tokens"]:
        return np.repeat(self.starts - self.pieces.begins, self.pieces.lengths) + np.arange(len(self.pieces.of))


class Layout(abc.ABC):
    """Rows of one split.

    Attributes:
      num_rows: Rows that hold every token once.
      num_tokens: Tokens in all of them; the first of the stream is none, it only stands before others.
      tokens_per_row: On average.
      num_cut: Examples that are too long for a row and lose some of their tokens; text loses none.
      rows_together: So many rows from a multiple of it on are neighbours in every batch.
    """

    num_rows: int
    num_tokens: int
    tokens_per_row: float
    num_cut: int = 0
    rows_together: int = 1

    @abc.abstractmethod
    def read(self, index: Int64[np.ndarray, "rows"]) -> Any:
        """The text, or the examples, of the rows of these numbers; numbers from `num_rows` on have none."""


class Windows(Layout):
    """Concatenate and split: row i has the tokens i * length + 1 ... (i + 1) * length of the stream.

    Documents follow each other within a row, and attention sees across them. The last row is shorter.
    """

    def __init__(self, tokens: Tokens, length: int):
        self.stream, self.length = tokens.stream, length
        self.num_tokens = max(len(self.stream) - 1, 0)
        self.num_rows = -(-self.num_tokens // length)
        self.tokens_per_row = self.num_tokens / max(self.num_rows, 1)

    def read(self, index: Int64[np.ndarray, "rows"]) -> Text:
        return self._read_from(index * self.length + 1)

    def _read_from(self, starts: Int64[np.ndarray, "rows"]) -> Text:
        lengths = np.clip(len(self.stream) - starts, 0, self.length)
        rows = np.flatnonzero(lengths)
        return Text(self.stream, starts[rows], Pieces(rows, lengths[rows], len(starts)))


class AllWindows(Windows):
    """The windows of `length` tokens that start anywhere: row i has the tokens i + 1 ... i + length of the stream."""

    def __init__(self, tokens: Tokens, length: int):
        super().__init__(tokens, length)
        self.num_rows = len(self.stream) - length
        self.tokens_per_row = length

    def read(self, index: Int64[np.ndarray, "rows"]) -> Text:
        return self._read_from(index + 1)


class DocumentRows(Layout):
    """One document per row; one that is longer than a row is cut and has several, side by side in number."""

    def __init__(self, tokens: Tokens, length: int):
        self.stream = tokens.stream
        self._starts, self._lengths, self._documents = _cut_documents(tokens.starts, tokens.ends, length)
        self.num_tokens, self.num_rows = int(self._lengths.sum()), len(self._starts)
        self.tokens_per_row = self.num_tokens / max(self.num_rows, 1)
        self.num_documents = len(np.unique(self._documents))

    def read(self, index: Int64[np.ndarray, "rows"]) -> Text:
        rows = np.flatnonzero(index < self.num_rows)
        pieces = Pieces(rows, self._lengths[index[rows]], len(index))
        return Text(self.stream, self._starts[index[rows]], pieces)

    def elsewhere(
        self, index: Int64[np.ndarray, "rows"], bits: UInt64[np.ndarray, "rows"]
    ) -> Int64[np.ndarray, "rows"]:
        """For each row the number of a random row of another document, of which there must be one."""
        document = self._documents[np.minimum(index, self.num_rows - 1)]
        first, end = (np.searchsorted(self._documents, document, side) for side in ("left", "right"))
        other = below(bits, self.num_rows - end + first)
        return np.where(other < first, other, other + end - first)


class PackedRows(Layout):
    """Whole documents side by side in a row, as pieces that do not see each other.

    Documents longer than a row are cut; nothing is lost.

    Args:
      tokens: of the split.
      length: tokens of the longest piece.
      costs: the room in a row that pieces of these lengths take.
      capacity: the room of a row, enough for the longest piece.
    """

    def __init__(self, tokens: Tokens, length: int, costs: Costs, capacity: int):
        self.stream = tokens.stream
        starts, lengths, _ = _cut_documents(tokens.starts, tokens.ends, length)
        row = best_fit(costs(lengths), capacity)
        order = np.argsort(row, kind="stable")
        self.num_tokens = int(lengths.sum())
        self.num_rows = int(row.max(initial=-1)) + 1
        self.tokens_per_row = self.num_tokens / max(self.num_rows, 1)
        # The pieces of row i are those from row_bounds[i] to row_bounds[i + 1]; an empty row follows the last.
        self._starts, self._lengths = starts[order], lengths[order]
        self._row_bounds = np.searchsorted(row[order], np.arange(self.num_rows + 2))

    def read(self, index: Int64[np.ndarray, "rows"]) -> Text:
        index = np.minimum(index, self.num_rows)
        counts = self._row_bounds[index + 1] - self._row_bounds[index]
        rows, number = ragged_arange(counts)
        piece = self._row_bounds[index][rows] + number
        return Text(self.stream, self._starts[piece], Pieces(rows, self._lengths[piece], len(index)))


def _cut_documents(starts, ends, length: int) -> tuple[Int64[np.ndarray, "pieces"], ...]:
    """Starts, lengths (at most `length`) and documents of the pieces."""
    num_pieces = -(-np.maximum(ends - starts, 0) // length)
    document, number = ragged_arange(num_pieces)
    piece_starts = np.asarray(starts)[document] + number * length
    return piece_starts, np.minimum(np.asarray(ends)[document] - piece_starts, length), document


def best_fit(sizes: Int64[np.ndarray, "pieces"], capacity: int) -> Int64[np.ndarray, "pieces"]:
    """The row of each piece: the largest first, each into the fullest row that has room (best-fit decreasing)."""
    row_of = np.empty(len(sizes), np.int64)
    rows_with_room = [[] for _ in range(capacity + 1)]
    rooms = 0  # Bit r is set while a row with room for exactly r more exists: the next fit is one bit search.
    num_rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row, num_rows = capacity, num_rows, num_rows + 1
        row_of[piece] = row
        if room > size:
            rows_with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return row_of


def best_fit_sides(
    sizes: Int64[np.ndarray, "pieces sides"], capacities: Int64[np.ndarray, "sides"]
) -> Int64[np.ndarray, "pieces"]:
    """The row of each piece, where rows have several sides (encoder and decoder), and pieces a size on each.

    In their order, each into the fullest of the open rows that have room on all sides. `_OPEN_ROWS` are open at a time:
    where none fits, the fullest is closed.
    """
    row_of = np.empty(len(sizes), np.int64)
    rest = np.tile(capacities, (_OPEN_ROWS, 1))
    free = np.full(_OPEN_ROWS, float(len(capacities)))
    rows, num_rows = np.arange(_OPEN_ROWS), _OPEN_ROWS
    for piece, size in enumerate(sizes):
        open_row = int(np.where((rest >= size).all(axis=1), free, np.inf).argmin())
        if (rest[open_row] < size).any():
            open_row = int(free.argmin())
            rows[open_row], rest[open_row], num_rows = num_rows, capacities, num_rows + 1
        row_of[piece] = rows[open_row]
        rest[open_row] -= size
        free[open_row] = (rest[open_row] / capacities).sum()
    return np.unique(row_of, return_inverse=True)[1]
