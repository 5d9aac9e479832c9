import grain
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.corpus import Tokens
from t5x_like.data.layouts import PackedRows, Windows

INPUTS, TARGETS, WEIGHTS = "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"
SEGMENTS, POSITIONS = "decoder_segment_ids", "decoder_positions"
PAD = 7

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
LENGTH = st.integers(1, 17)


def numbered(lengths) -> Tokens:
    """Documents of distinct tokens 100, 101, ..., so that a token names its place; 99 stands before the first."""
    ends = np.cumsum(lengths) + 1
    return Tokens(np.arange(99, 99 + ends[-1]), ends - np.array(lengths), ends, 0)


@given(LENGTHS, LENGTH)
def test_windows_lose_and_repeat_nothing(lengths, length):
    tokens = numbered(lengths)
    windows = Windows(tokens, length, PAD)
    rows = windows.read(np.arange(windows.num_rows))
    real = rows[WEIGHTS] == 1
    assert rows[TARGETS][real].tolist() == tokens.stream[1:].tolist()
    assert rows[INPUTS][real].tolist() == tokens.stream[:-1].tolist()
    assert windows.num_targets == real.sum() == sum(lengths)
    assert (rows[INPUTS][~real] == PAD).all()
    assert (rows[TARGETS][~real] == PAD).all()
    assert real[:-1].all()
    assert {name: values.dtype for name, values in rows.items()} == {INPUTS: "int32", TARGETS: "int32", WEIGHTS: "f4"}


@given(LENGTHS, LENGTH)
def test_packing_loses_nothing_and_never_crosses_documents(lengths, length):
    tokens = numbered(lengths)
    packed = PackedRows(tokens, length, PAD)
    rows = packed.read(np.arange(packed.num_rows))
    real = rows[WEIGHTS] == 1
    assert sorted(rows[TARGETS][real]) == tokens.stream[1:].tolist()
    assert (rows[INPUTS][real] == rows[TARGETS][real] - 1).all()
    assert packed.num_targets == real.sum()
    assert ((rows[SEGMENTS] > 0) == real).all()
    for name, padding in ((INPUTS, PAD), (TARGETS, PAD), (POSITIONS, 0)):
        assert (rows[name][~real] == padding).all()

    document = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(packed.num_rows):
        for segment in range(1, rows[SEGMENTS][row].max() + 1):
            inside = rows[SEGMENTS][row] == segment
            targets = rows[TARGETS][row][inside]
            assert len(set(document[targets - 100])) == 1
            assert np.diff(targets).tolist() == [1] * (len(targets) - 1)
            assert np.diff(np.flatnonzero(inside)).tolist() == [1] * (len(targets) - 1)
            assert rows[POSITIONS][row][inside].tolist() == list(range(len(targets)))


@given(LENGTHS, LENGTH)
def test_rows_beyond_the_end_are_empty(lengths, length):
    for layout in (Windows(numbered(lengths), length, PAD), PackedRows(numbered(lengths), length, PAD)):
        rows = layout.read(layout.num_rows + np.array([0, 1, 5]))
        assert (rows[WEIGHTS] == 0).all()
        assert (rows[INPUTS] == PAD).all()


def test_documents_without_any_target():
    # A tokenizer without eos leaves none in a document of one token, nor in one of no token.
    tokens = Tokens(np.arange(4), starts=np.array([1, 2, 4]), ends=np.array([1, 4, 3]), num_bytes=0)
    packed = PackedRows(tokens, 4, PAD)
    assert packed.read(np.arange(1))[TARGETS].tolist() == [[2, 3, PAD, PAD]]
    assert packed.num_targets == 2
    assert PackedRows(Tokens(np.zeros(0), np.zeros(0, int), np.zeros(0, int), 0), 4, PAD).num_rows == 0
    assert Windows(Tokens(np.zeros(0), np.zeros(0, int), np.zeros(0, int), 0), 4, PAD).num_rows == 0


def test_packing_fills_rows_better_than_grain():
    length = 512
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.5, 1.2, 3000).astype(int) + 1, length)
    packed = PackedRows(numbered(lengths), length, PAD)
    documents = grain.MapDataset.source([{"x": np.ones(n, np.int32)} for n in lengths]).to_iter_dataset()
    theirs = grain.experimental.BestFitPackIterDataset(documents, length_struct={"x": length}, num_packing_bins=64)
    assert packed.num_rows <= sum(1 for _ in theirs)
    assert packed.num_targets / (packed.num_rows * length) > 0.97
