import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from t5x_like.data.objectives.permutation import PermutationLM
from t5x_like.errors import UserError
from tests.data.objectives import toy

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(LENGTHS, st.sampled_from([1 / 6, 0.5]), st.sampled_from(["concatenate", "pack", "documents"]), st.integers(0, 5))
def test_streams(lengths, rate, layout, seed):
    objective = PermutationLM(prediction_rate=rate)
    text, rows = toy.rows_in_order(objective, toy.text(lengths), length=30, layout=layout, seed=seed)
    rows = {name.removeprefix("decoder_"): values for name, values in rows.items()}
    used = (rows["key_mask"] == 1) | (rows["loss_weights"] == 1)
    assert ((rows["key_mask"] == 1) & (rows["loss_weights"] == 1)).sum() == 0
    segments = rows.get("segment_ids", used.astype(int))
    for (row, number), original in toy.pieces_of(text).items():
        where = segments[row] == number
        piece = {name: values[row][where] for name, values in rows.items()}
        count = len(original)
        content, query = piece["key_mask"] == 1, piece["loss_weights"] == 1
        assert content.tolist() == [True] * count + [False] * (len(content) - count)
        assert piece["input_tokens"][content].tolist() == original
        assert piece["positions"][content].tolist() == list(range(count))
        rank = piece["order"][content] // 2
        assert piece["order"][content].tolist() == (2 * rank + 1).tolist()
        assert sorted(rank) == list(range(count))
        # Queries: the last 1/K of the order, at the places of what they predict, just before it in the order.
        assert query.sum() == (min(max(round(count * rate), 1), count - 1) if count > 1 else 0)
        assert (piece["input_tokens"][query] == toy.TOKENIZER.mask_id).all()
        places = piece["positions"][query]
        assert piece["target_tokens"][query].tolist() == [original[place] for place in places]
        assert piece["order"][query].tolist() == (2 * rank[places]).tolist()
        assert sorted(rank[places]) == list(range(count - query.sum(), count))
        # What a plain causal mask on the order lets them see.
        sees = (piece["order"][None, :] <= piece["order"][:, None]) & content[None, :]
        ranks = np.concatenate([rank, rank[places]])
        for i in range(len(ranks)):
            assert set(ranks[np.flatnonzero(sees[i])]) == set(range(ranks[i] + (1 if content[i] else 0)))


def test_orders_are_uniform():
    _, rows = toy.rows_in_order(PermutationLM(prediction_rate=0.25), toy.text([40_001]), length=5)
    assert PermutationLM(prediction_rate=0.25).text_length(5) == 4
    orders = [tuple(order) for order in rows["decoder_order"][:-1, :4].tolist()]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_bad_field_is_named(rate):
    with pytest.raises(UserError, match=rf"PermutationLM\.prediction_rate={rate}"):
        PermutationLM(prediction_rate=rate)
