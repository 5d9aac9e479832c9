import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.pieces import Pieces, Ragged, constant, join, select

ROWS = st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6)


def make(rows, begin=0):
    """Pieces of these lengths with distinct values, and the same as lists."""
    lengths = np.array([n for row in rows for n in row], int)
    pieces = Pieces(np.repeat(np.arange(len(rows)), [len(row) for row in rows]), lengths, len(rows))
    values = begin + np.arange(lengths.sum())
    nested, place = [], 0
    for row in rows:
        nested.append([])
        for n in row:
            nested[-1].append(values[place : place + n].tolist())
            place += n
    return Ragged(pieces, values), nested


@given(ROWS)
def test_rows_are_filled_from_the_left(rows):
    ragged, nested = make(rows, begin=1)
    padded = ragged.pieces.pad(ragged.values, 20, padding=-1)
    segments, positions = ragged.pieces.segment_ids(20), ragged.pieces.positions(20)
    for row, pieces in enumerate(nested):
        flat = [value for piece in pieces for value in piece]
        assert padded[row].tolist() == flat + [-1] * (20 - len(flat))
        ids = [number for number, piece in enumerate(pieces, start=1) for _ in piece]
        assert segments[row].tolist() == ids + [0] * (20 - len(flat))
        places = [place for piece in pieces for place in range(len(piece))]
        assert positions[row].tolist() == places + [0] * (20 - len(flat))


@given(ROWS)
def test_pieces_are_changed_one_by_one(rows):
    first, lists = make(rows)
    second, others = make([row[::-1] for row in rows], begin=1000)
    flat = [(a, b) for row, other in zip(lists, others, strict=True) for a, b in zip(row, other, strict=True)]

    def parts(ragged):
        return [part.tolist() for part in np.split(ragged.values, ragged.pieces.begins[1:])][: len(flat)]

    assert parts(join(first, second)) == [a + b for a, b in flat]
    assert parts(join(constant(first.pieces, 7), first)) == [[7, *a] for a, _ in flat]
    assert parts(select(first, first.values % 2 == 1)) == [[value for value in a if value % 2] for a, _ in flat]
    assert first.shifted(-5).tolist() == [value for a, _ in flat if a for value in [-5, *a[:-1]]]


def test_a_row_has_no_room_for_more():
    ragged, _ = make([[3, 2], [1]])
    with pytest.raises(AssertionError, match="5 values in a row of 4"):
        ragged.pieces.segment_ids(4)
