"""How a token stream becomes rows of a fixed length: random access by row number.

Rows are dicts of arrays [rows, length] with T5X's feature names: `decoder_input_tokens`, `decoder_target_tokens`
(int32; the target is the token behind the input) and `decoder_loss_weights` (float32; 0 where there is no target).
"""

from typing import Protocol

import numpy as np
from jaxtyping import Int64, Shaped

from t5x_like.data.corpus import Tokens

Rows = dict[str, Shaped[np.ndarray, "rows length"]]


class Layout(Protocol):
    """Rows of one split.

    Attributes:
      num_rows: Rows that hold every target once.
      num_targets: Targets in all of them.
    """

    num_rows: int
    num_targets: int

    def read(self, index: Int64[np.ndarray, "rows"]) -> Rows:
        """The rows of these numbers; numbers from `num_rows` on give rows without any target."""


class Windows:
    """Concatenate and split: row i has the targets i * length + 1 ... (i + 1) * length of the stream.

    Documents follow each other within a row, and attention sees across them. The last row is padded.
    """

    def __init__(self, tokens: Tokens, length: int, pad: int):
        self.stream, self.length, self.pad = tokens.stream, length, pad
        self.num_targets = max(len(self.stream) - 1, 0)
        self.num_rows = -(-self.num_targets // length)

    def read(self, index: Int64[np.ndarray, "rows"]) -> Rows:
        return self.read_from(index * self.length)

    def read_from(self, start: Int64[np.ndarray, "rows"]) -> Rows:
        """Rows whose first inputs stand at these places in the stream."""
        place = start[:, None] + np.arange(self.length + 1)
        tokens = self.stream[np.minimum(place, len(self.stream) - 1)].astype(np.int32)
        exists = place[:, 1:] < len(self.stream)
        return {
            "decoder_input_tokens": np.where(exists, tokens[:, :-1], self.pad),
            "decoder_target_tokens": np.where(exists, tokens[:, 1:], self.pad),
            "decoder_loss_weights": exists.astype(np.float32),
        }


class PackedRows:
    """Whole documents side by side in a row, each with its own segment id (from 1) and positions (from 0).

    Documents longer than a row are cut; nothing is lost, and no target is predicted from another document. Adds
    `decoder_segment_ids` and `decoder_positions` (int32, 0 at padding).
    """

    def __init__(self, tokens: Tokens, length: int, pad: int):
        self.stream, self.length, self.pad = tokens.stream, length, pad
        starts, lengths = _cut_documents(tokens.starts, tokens.ends, length)
        row = _best_fit(lengths, length)
        order = np.argsort(row, kind="stable")
        self.num_targets = int(lengths.sum())
        self.num_rows = int(row.max(initial=-1)) + 1
        # The segments of row i are those from row_bounds[i] to row_bounds[i + 1]; an empty row follows the last.
        self.starts, self.lengths = starts[order], lengths[order]
        self.row_bounds = np.searchsorted(row[order], np.arange(self.num_rows + 2))

    def read(self, index: Int64[np.ndarray, "rows"]) -> Rows:
        index = np.minimum(index, self.num_rows)
        counts = self.row_bounds[index + 1] - self.row_bounds[index]
        in_row, segment_number = _ragged(counts)
        segment = self.row_bounds[index][in_row] + segment_number
        in_segment, position = _ragged(self.lengths[segment])
        source = self.starts[segment][in_segment] + position
        # Segments stand side by side from the left: a target's column is its place among the targets of its row.
        row = in_row[in_segment]
        column = _ragged(np.bincount(row, minlength=len(index)))[1]

        def scatter(values, fill, dtype=np.int32):
            out = np.full((len(index), self.length), fill, dtype)
            out[row, column] = values
            return out

        return {
            "decoder_input_tokens": scatter(self.stream[source - 1], self.pad),
            "decoder_target_tokens": scatter(self.stream[source], self.pad),
            "decoder_loss_weights": scatter(1, 0, np.float32),
            "decoder_segment_ids": scatter(segment_number[in_segment] + 1, 0),
            "decoder_positions": scatter(position, 0),
        }


def _ragged(counts: Int64[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "total"], Int64[np.ndarray, "total"]]:
    """For n groups of these sizes laid out in a line: the group of each member, and its place within the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]


def _cut_documents(starts, ends, length: int) -> tuple[Int64[np.ndarray, "pieces"], Int64[np.ndarray, "pieces"]]:
    """Starts and lengths of the pieces, of at most `length` targets, of the documents."""
    num_pieces = -(-np.maximum(ends - starts, 0) // length)
    document, number = _ragged(num_pieces)
    piece_starts = np.asarray(starts)[document] + number * length
    return piece_starts, np.minimum(np.asarray(ends)[document] - piece_starts, length)


def _best_fit(lengths: Int64[np.ndarray, "pieces"], capacity: int) -> Int64[np.ndarray, "pieces"]:
    """The row of each piece: the longest first, each into the fullest row that has room (best-fit decreasing)."""
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room = [[] for _ in range(capacity + 1)]
    rooms = 0  # Bit r is set while a row with room for exactly r more tokens exists: the next fit is one bit search.
    num_rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
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
