import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.objectives.causal import CausalLM, PrefixLM
from t5x_like.errors import UserError
from tests.data.objectives import toy

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


@given(LENGTHS, st.sampled_from(["concatenate", "pack", "documents"]))
def test_causal_targets_are_the_next_tokens(lengths, layout):
    tokens = toy.text(lengths)
    text, rows = toy.rows_in_order(CausalLM(), tokens, length=16, layout=layout)
    real = rows["decoder_loss_weights"] == 1
    assert real.sum() == sum(lengths)
    assert rows["decoder_target_tokens"][real].tolist() == text.tokens.tolist()
    assert rows["decoder_input_tokens"][real].tolist() == text.before.tolist()


@given(LENGTHS, st.sampled_from(["concatenate", "pack"]), st.integers(0, 5))
def test_prefix_comes_first_and_the_suffix_is_predicted(lengths, layout, seed):
    tokens = toy.text(lengths)
    text, rows = toy.rows_in_order(PrefixLM(), tokens, length=16, layout=layout, seed=seed)
    causal = toy.rows_in_order(CausalLM(), tokens, length=16, layout=layout)[1]
    for name in causal.keys() - {"decoder_loss_weights"}:
        assert np.array_equal(rows[name], causal[name])
    begins = text.pieces.begins
    real = causal["decoder_loss_weights"] == 1
    orders, weights = rows["decoder_order"][real], rows["decoder_loss_weights"][real]
    for begin, length in zip(begins, text.pieces.lengths, strict=True):
        order, weight = orders[begin : begin + length].tolist(), weights[begin : begin + length]
        prefix = order.count(0)
        assert 1 <= prefix <= length
        assert order == [0] * prefix + list(range(1, length - prefix + 1))
        # What is predicted is behind all tokens that see each other; the last of them predicts the first of it.
        assert weight.tolist() == [0] * (prefix - 1) + [1] * (length - prefix + 1)
    assert (rows["decoder_order"][~real] > rows["decoder_order"][real].max()).all()
    assert (rows["decoder_loss_weights"][~real] == 0).all()


@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_share_that_is_predicted(rate):
    _, rows = toy.rows_in_order(PrefixLM(mean_suffix_rate=rate), toy.text([100_001]), length=50)
    counts = rows["decoder_loss_weights"][:-1].sum(axis=1)
    most = int(2 * rate * 50)
    assert set(counts) == set(range(1, most + 1))
    assert abs(counts.mean() - (most + 1) / 2) < 5 * most / np.sqrt(12 * 2000)


@pytest.mark.parametrize("rate", [0.0, 0.6, -1.0])
def test_bad_rates(rate):
    with pytest.raises(UserError, match=rf"PrefixLM\.mean_suffix_rate={rate}"):
        PrefixLM(mean_suffix_rate=rate)
