import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.batches import OrderedBatches, RandomWindows, ShuffledBatches
from t5x_like.data.layouts import AllWindows, PackedRows, Windows
from t5x_like.data.objectives.causal import CausalLM
from t5x_like.data.tokenizers import ByteTokenizer
from t5x_like.data.tokens import Tokens

INPUTS, TARGETS, WEIGHTS = "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"


def windows(num_rows, length=4):
    """Rows whose first target, divided by `length`, is their number."""
    return Windows(numbered(num_rows * length), length)


def numbered(size):
    return Tokens(np.arange(-1, size), np.zeros(0), np.zeros(0), 0)


def causal(length=4):
    return CausalLM().build(ByteTokenizer(), length, packed=False)


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 5))
def test_every_row_once_per_epoch(num_rows, batch_size, seed):
    batches = ShuffledBatches(windows(num_rows), causal(), batch_size, seed)
    num_steps = -(-3 * num_rows // batch_size)
    seen = np.concatenate([batches.batch(step)[TARGETS][:, 0] // 4 for step in range(num_steps)])
    epochs = seen[: 3 * num_rows].reshape(3, num_rows)
    assert (np.sort(epochs) == np.arange(num_rows)).all()


def test_epochs_and_seeds_have_different_orders():
    def order(seed, step):
        return tuple(ShuffledBatches(windows(100), causal(), 100, seed).batch(step)[TARGETS][:, 0] // 4)

    orders = {order(seed, step) for seed in range(3) for step in range(3)}
    assert len(orders) == 9
    assert tuple(range(100)) not in orders


@given(st.integers(0, 50), st.slices(12))
def test_any_rows_of_any_batch_alone(step, rows):
    lengths = np.random.default_rng(0).integers(1, 30, 50)
    ends = np.cumsum(lengths) + 1
    tokens = Tokens(np.arange(ends[-1]), ends - lengths, ends, 0)
    for batches in (
        ShuffledBatches(Windows(tokens, 8), causal(8), 12, seed=1),
        ShuffledBatches(PackedRows(tokens, 16, np.array, 16), causal(16), 12, seed=1),
        RandomWindows(AllWindows(tokens, 8), causal(8), 12, seed=1),
        OrderedBatches(Windows(tokens, 8), causal(8), 12),
    ):
        whole, part = batches.batch(step), batches.batch(step, rows=rows)
        for name, values in whole.items():
            assert np.array_equal(values[rows], part[name])


def test_random_windows_start_anywhere():
    layout = AllWindows(numbered(20), 4)
    starts = np.concatenate(
        [RandomWindows(layout, causal(), 50, seed=0).batch(step)[INPUTS][:, 0] + 1 for step in range(100)]
    )
    # nanoGPT: torch.randint(len(data) - block_size, (batch_size,)), with 21 tokens and blocks of 4.
    counts = np.bincount(starts, minlength=17)
    assert len(counts) == 17
    assert counts.min() > 200
    batch = RandomWindows(layout, causal(), 50, seed=0).batch(3)
    assert (batch[TARGETS] == batch[INPUTS] + 1).all()
    assert (batch[WEIGHTS] == 1).all()
    assert not np.array_equal(batch[INPUTS], RandomWindows(layout, causal(), 50, seed=1).batch(3)[INPUTS])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_validation_is_complete_and_in_order(batch_size):
    batches = OrderedBatches(windows(5), causal(), batch_size)
    rows = [batches.batch(number) for number in range(batches.num_batches)]
    assert all(row[INPUTS].shape == (batch_size, 4) for row in rows)
    weights = np.concatenate([row[WEIGHTS] for row in rows])
    targets = np.concatenate([row[TARGETS] for row in rows])
    assert targets[weights == 1].tolist() == list(range(20))
