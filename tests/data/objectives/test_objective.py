"""What holds for every objective."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.batches import OrderedBatches
from t5x_like.data.objectives.causal import CausalLM, PrefixLM
from t5x_like.data.objectives.corruption import UL2, SpanCorruption
from t5x_like.data.objectives.denoising import Denoising
from t5x_like.data.objectives.masked import MaskedLM
from t5x_like.data.objectives.permutation import PermutationLM
from tests.data.objectives import toy

OBJECTIVES = [
    CausalLM(),
    PrefixLM(),
    MaskedLM(),
    MaskedLM(whole_words=True),
    MaskedLM(pairs="next"),
    MaskedLM(pairs="order"),
    SpanCorruption(),
    SpanCorruption(architecture="decoder"),
    UL2(),
    UL2(architecture="decoder"),
    PermutationLM(),
    Denoising(shuffle_sentences=True, deletion_rate=0.1, replacement_rate=0.1),
]
TOKENS = toy.text(np.random.default_rng(0).integers(1, 120, 60))
EACH = [
    (objective, layout)
    for objective in OBJECTIVES
    for layout in ("concatenate", "pack", "documents")
    if layout == "documents" or not objective.needs_documents
]


@pytest.mark.parametrize(("objective", "layout"), EACH)
def test_any_rows_of_any_batch_alone(objective, layout):
    rows, training = toy.batches(objective, TOKENS, length=40, layout=layout, seed=3)
    validation = OrderedBatches(rows, training.transform, 8)

    @given(st.integers(0, 40), st.slices(8))
    def check(step, part):
        for batches in (training, validation):
            whole, some = batches.batch(step), batches.batch(step, rows=part)
            for name, values in whole.items():
                assert np.array_equal(values[part], some[name])

    check()


@pytest.mark.parametrize(("objective", "layout"), EACH)
def test_features_are_those_announced(objective, layout):
    rows, training = toy.batches(objective, TOKENS, length=40, layout=layout)
    features = objective.features(40, packed=layout == "pack")
    # Rows beyond the end have nothing to predict.
    beyond = training.transform(rows, rows.num_rows + np.arange(3), np.arange(3).astype(np.uint64))
    for batch, size in ((training.batch(0), 8), (beyond, 3)):
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            name: ((size, *shape), dtype) for name, (shape, dtype) in features.items()
        }
    for name, values in beyond.items():
        assert not values.any() or name == "decoder_order", name


@pytest.mark.parametrize("objective", [objective for objective in OBJECTIVES if objective != CausalLM()])
def test_noise_differs_by_row_epoch_and_seed_and_repeats_with_them(objective):
    layout = "documents" if objective.needs_documents else "concatenate"
    rows, training = toy.batches(objective, TOKENS, length=40, layout=layout, batch_size=8, seed=1)
    index = np.zeros(200, int)
    same_text = training.transform(rows, index, np.arange(200).astype(np.uint64))
    assert len({tuple(value.tobytes() for value in row) for row in zip(*same_text.values(), strict=True)}) > 15
    again = toy.batches(objective, TOKENS, length=40, layout=layout, batch_size=8, seed=1)[1]
    other = toy.batches(objective, TOKENS, length=40, layout=layout, batch_size=8, seed=2)[1]
    for step in (0, 7, 10**6):
        batch = training.batch(step)
        assert all(np.array_equal(values, batch[key]) for key, values in again.batch(step).items())
        assert not all(np.array_equal(values, batch[key]) for key, values in other.batch(step).items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_validation_meets_the_same_noise_in_any_batch_size(objective):
    layout = "documents" if objective.needs_documents else "concatenate"
    rows, training = toy.batches(objective, TOKENS, length=40, layout=layout)
    read = {}
    for size in (3, 8):
        batches = OrderedBatches(rows, training.transform, size)
        each = [batches.batch(number) for number in range(batches.num_batches)]
        read[size] = {name: np.concatenate([b[name] for b in each])[: rows.num_rows] for name in each[0]}
    assert all(np.array_equal(values, read[8][name]) for name, values in read[3].items())


@pytest.mark.parametrize(("objective", "layout"), [each for each in EACH if each[1] == "pack"])
def test_packing_wastes_little(objective, layout):
    lengths = np.minimum(np.random.default_rng(0).lognormal(3.5, 1.0, 2000).astype(int) + 1, 400)
    rows, training = toy.batches(objective, toy.text(lengths), length=128, layout=layout, batch_size=64)
    assert rows.num_tokens == lengths.sum()
    batch = training.batch(0)
    fills = {name: float(np.mean(values > 0)) for name, values in batch.items() if name.endswith("segment_ids")}
    assert max(fills.values()) > (0.6 if isinstance(objective, UL2) else 0.95), fills
