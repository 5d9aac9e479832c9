"""Pieces of text of different lengths, side by side in rows: how arrays without padding become arrays with it."""

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Int64, Shaped


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Where pieces stand in rows; the values of all pieces lie on end in one flat array, the pieces in this order.

    Attributes:
      rows: the row of each piece, ascending; a row may have none.
      lengths: the number of values of each piece.
      num_rows: the number of rows.
    """

    rows: Int64[np.ndarray, "pieces"]
    lengths: Int64[np.ndarray, "pieces"]
    num_rows: int

    def resized(self, lengths: Int64[np.ndarray, "pieces"]) -> "Pieces":
        """The same pieces with other lengths."""
        return Pieces(self.rows, lengths, self.num_rows)

    @cached_property
    def begins(self) -> Int64[np.ndarray, "pieces"]:
        """Where each piece begins in the flat array."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def number(self) -> Int64[np.ndarray, "pieces"]:
        """Which piece of its row it is, from 0."""
        return np.arange(len(self.rows)) - np.searchsorted(self.rows, self.rows)

    @cached_property
    def of(self) -> Int64[np.ndarray, "values"]:
        """The piece of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def position(self) -> Int64[np.ndarray, "values"]:
        """The place of each value in its piece, from 0."""
        return np.arange(len(self.of)) - np.repeat(self.begins, self.lengths)

    def pad(
        self, values: Shaped[np.ndarray, "values"], length: int, padding: int = 0, dtype: str = "int32"
    ) -> Shaped[np.ndarray, "rows length"]:
        """The values in rows of one length, each filled from the left."""
        out = np.full((self.num_rows, length), padding, dtype)
        out.reshape(-1)[self._cells(length)] = values
        return out

    def segment_ids(self, length: int) -> Shaped[np.ndarray, "rows length"]:
        """1 for the first piece of a row, 2 for the second, ...; 0 where there is none."""
        return self.pad(np.repeat(self.number + 1, self.lengths), length)

    def positions(self, length: int) -> Shaped[np.ndarray, "rows length"]:
        """0, 1, 2, ... in each piece; 0 where there is none."""
        return self.pad(self.position, length)

    def _cells(self, length: int) -> Int64[np.ndarray, "values"]:
        """The place of each value in the rows, seen as one flat array."""
        if length not in self._cells_by_length:
            columns = self.begins - self.begins[np.searchsorted(self.rows, self.rows)]
            room = int((columns + self.lengths).max(initial=0))
            assert room <= length, f"{room} values in a row of {length}"
            shifts = columns + self.rows * length - self.begins
            self._cells_by_length[length] = np.arange(len(self.of)) + np.repeat(shifts, self.lengths)
        return self._cells_by_length[length]

    @cached_property
    def _cells_by_length(self) -> dict[int, Int64[np.ndarray, "values"]]:
        return {}


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Values of pieces, and how long these are."""

    pieces: Pieces
    values: Shaped[np.ndarray, "values"]

    def shifted(self, first: int) -> Shaped[np.ndarray, "values"]:
        """The value before each within its piece; `first` before the first one."""
        before = np.empty_like(self.values)
        before[1:] = self.values[:-1]
        before[self.pieces.begins[self.pieces.lengths > 0]] = first
        return before


def join(first: Ragged, second: Ragged) -> Ragged:
    """Each piece of `first` and, behind it, that of `second`."""
    lengths = np.stack([first.pieces.lengths, second.pieces.lengths], axis=1).reshape(-1)
    is_first = np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)
    values = np.empty(len(is_first), first.values.dtype)
    values[is_first] = first.values
    values[~is_first] = second.values
    return Ragged(first.pieces.resized(first.pieces.lengths + second.pieces.lengths), values)


def constant(pieces: Pieces, values: Shaped[np.ndarray, "pieces"] | int) -> Ragged:
    """One value for each piece."""
    return Ragged(pieces.resized(np.ones_like(pieces.lengths)), np.broadcast_to(np.int32(values), pieces.lengths.shape))


def select(ragged: Ragged, chosen: Shaped[np.ndarray, "values"]) -> Ragged:
    """The values where `chosen` is true."""
    lengths = np.bincount(ragged.pieces.of[chosen], minlength=len(ragged.pieces.lengths))
    return Ragged(ragged.pieces.resized(lengths), ragged.values[chosen])


def ragged_arange(counts: Int64[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "total"], Int64[np.ndarray, "total"]]:
    """For n groups of these sizes laid out in a line: the group of each member, and its place within the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
