import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.layouts import AllWindows, DocumentRows, PackedRows, Windows, best_fit_sides
from t5x_like.data.tokens import Tokens

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
LENGTH = st.integers(1, 17)


def numbered(lengths) -> Tokens:
    """Documents of distinct tokens 100, 101, ..., so that a token names its place; 99 stands before the first."""
    ends = np.cumsum(lengths) + 1
    return Tokens(np.arange(99, 99 + ends[-1]), ends - np.array(lengths), ends, 0)


def packed(tokens, length, extra=0):
    return PackedRows(tokens, length, lambda lengths: lengths + extra, length + extra)


def read_all(layout):
    return layout.read(np.arange(layout.num_rows))


@given(LENGTHS, LENGTH)
def test_windows_lose_and_repeat_nothing(lengths, length):
    tokens = numbered(lengths)
    layout = Windows(tokens, length)
    text = read_all(layout)
    assert text.tokens.tolist() == tokens.stream[1:].tolist()
    assert text.before.tolist() == tokens.stream[:-1].tolist()
    assert text.pieces.rows.tolist() == list(range(layout.num_rows))
    assert (text.pieces.lengths[:-1] == length).all()
    assert layout.num_tokens == sum(lengths) == round(layout.tokens_per_row * layout.num_rows)
    assert text.tokens.dtype == text.before.dtype == np.int32


def test_windows_start_anywhere():
    text = read_all(AllWindows(numbered([9]), 4))
    assert text.tokens.reshape(-1, 4).tolist() == [[100 + start + i for i in range(4)] for start in range(6)]


@given(LENGTHS, LENGTH, st.integers(0, 3))
def test_packing_loses_nothing_and_never_crosses_documents(lengths, length, extra):
    tokens = numbered(lengths)
    layout = packed(tokens, length, extra)
    text = read_all(layout)
    assert sorted(text.tokens) == tokens.stream[1:].tolist()
    assert layout.num_tokens == len(text.tokens)
    room = np.bincount(text.pieces.rows, weights=text.pieces.lengths + extra)
    assert room.max() <= length + extra
    check_pieces(text, lengths, length)


@given(LENGTHS, LENGTH)
def test_documents_are_cut_into_rows(lengths, length):
    tokens = numbered(lengths)
    layout = DocumentRows(tokens, length)
    text = read_all(layout)
    assert text.tokens.tolist() == tokens.stream[1:].tolist()
    assert text.pieces.rows.tolist() == list(range(layout.num_rows))
    assert layout.num_rows == sum(-(-n // length) for n in lengths)
    assert layout.num_documents == len(lengths)
    check_pieces(text, lengths, length)


def check_pieces(text, lengths, length):
    document = np.repeat(np.arange(len(lengths)), lengths)
    assert (text.before == text.tokens - 1).all()
    assert (text.pieces.lengths <= length).all()
    for piece in np.split(text.tokens, text.pieces.begins[1:]):
        assert len(set(document[piece - 100])) == 1
        assert np.diff(piece).tolist() == [1] * (len(piece) - 1)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), LENGTH)
def test_rows_of_other_documents(lengths, length):
    layout = DocumentRows(numbered(lengths), length)
    document = np.repeat(np.arange(len(lengths)), [-(-n // length) for n in lengths])
    for row in range(layout.num_rows):
        others = np.flatnonzero(document != document[row])
        bits = np.arange(len(others)).astype(np.uint64)
        # Each of them once as the bits go round.
        assert sorted(layout.elsewhere(np.full(len(others), row), bits)) == others.tolist()


@given(LENGTHS, LENGTH)
def test_rows_beyond_the_end_are_empty(lengths, length):
    for layout in (
        Windows(numbered(lengths), length),
        packed(numbered(lengths), length),
        DocumentRows(numbered(lengths), length),
    ):
        text = layout.read(layout.num_rows + np.array([0, 1, 5]))
        assert len(text.tokens) == len(text.pieces.rows) == 0
        assert text.pieces.num_rows == 3


def test_documents_without_any_target():
    # A tokenizer without eos leaves none in a document of one token, nor in one of no token.
    tokens = Tokens(np.arange(4), starts=np.array([1, 2, 4]), ends=np.array([1, 4, 3]), num_bytes=0)
    for layout in (packed(tokens, 4), DocumentRows(tokens, 4)):
        assert read_all(layout).tokens.tolist() == [2, 3]
        assert layout.num_tokens == 2


@pytest.mark.parametrize("make", [packed, DocumentRows, Windows])
def test_no_text_at_all(make):
    assert make(Tokens(np.zeros(0), np.zeros(0, int), np.zeros(0, int), 0), 4).num_rows == 0


def test_packing_fills_rows_better_than_grain():
    grain = pytest.importorskip("grain")
    length = 512
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.5, 1.2, 3000).astype(int) + 1, length)
    ours = packed(numbered(lengths), length)
    documents = grain.MapDataset.source([{"x": np.ones(n, np.int32)} for n in lengths]).to_iter_dataset()
    theirs = grain.experimental.BestFitPackIterDataset(documents, length_struct={"x": length}, num_packing_bins=64)
    assert ours.num_rows <= sum(1 for _ in theirs)
    assert ours.num_tokens / (ours.num_rows * length) > 0.97


def test_rows_with_two_sides_are_full_on_one_and_overfull_on_none():
    rng = np.random.default_rng(0)
    long, short = rng.lognormal(4, 1, 6000), rng.lognormal(1, 1, 6000)
    sizes = np.stack([np.clip(long, 1, 512), np.clip(short, 1, 114)], axis=1).astype(np.int64)
    capacities = np.array([512, 114])
    row = best_fit_sides(sizes, capacities)
    used = np.stack([np.bincount(row, weights=side) for side in sizes.T], axis=1)
    assert (used <= capacities).all()
    assert used.min(axis=0)[0] > 0
    assert used[:, 0].sum() / (len(used) * 512) >= 0.97
