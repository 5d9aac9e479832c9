import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.objectives.denoising import Denoising
from t5x_like.errors import UserError
from tests.data.objectives import toy

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)
MASK = toy.TOKENIZER.mask_id


def pairs(objective, lengths, layout="pack", length=32, seed=0):
    """The text of each piece with the inputs and targets made of it, eos taken off."""
    text, rows = toy.rows_in_order(objective, toy.text(lengths), length=length, layout=layout, seed=seed)
    sides = []
    for side, name in (("encoder", "input"), ("decoder", "target")):
        tokens = rows[f"{side}_{name}_tokens"]
        sides.append([tokens[row][where].tolist() for row, _, where in toy.segments(rows, side)])
    originals = list(toy.pieces_of(text).values())
    for original, inputs, targets in zip(originals, *sides, strict=True):
        assert inputs[-1] == toy.EOS
        assert targets == [*original, toy.EOS]
        yield original, inputs[:-1]


def is_subsequence(some, every):
    rest = iter(every)
    return all(token in rest for token in some)


@given(LENGTHS, st.sampled_from(["concatenate", "pack", "documents"]), st.integers(0, 5))
def test_each_noise_is_what_it_says(lengths, layout, seed):
    for original, inputs in pairs(Denoising(), lengths, layout, seed=seed):
        assert is_subsequence([token for token in inputs if token != MASK], original)
        assert len(original) < 2 or 0 < inputs.count(MASK) < len(original)
        assert not any(a == b == MASK for a, b in itertools.pairwise(inputs))
    for original, inputs in pairs(Denoising(infilling_rate=0, deletion_rate=0.3), lengths, layout, seed=seed):
        assert is_subsequence(inputs, original)
    for original, inputs in pairs(Denoising(infilling_rate=0, replacement_rate=0.3), lengths, layout, seed=seed):
        assert len(inputs) == len(original)
        assert all(3 <= new < 259 for new, old in zip(inputs, original, strict=True) if new != old)


@given(LENGTHS, st.integers(0, 5))
def test_sentences_change_places_whole(lengths, seed):
    def sentences(tokens):
        ends = [i + 1 for i, token in enumerate(tokens[:-1]) if token in (*toy.TOKENIZER.encode(".!?"), toy.EOS)]
        return [tuple(tokens[a:b]) for a, b in itertools.pairwise([0, *ends, len(tokens)])]

    objective = Denoising(infilling_rate=0, shuffle_sentences=True)
    for original, inputs in pairs(objective, lengths, seed=seed):
        whole = sentences(original)
        # Some order of the sentences gives the inputs.
        if len(whole) <= 5:
            assert any(sum(order, ()) == tuple(inputs) for order in itertools.permutations(whole))
        assert sorted(inputs) == sorted(original)


def test_rates():
    for rate in (0.1, 0.5):
        changed = list(pairs(Denoising(infilling_rate=0, deletion_rate=rate), [100_000], "concatenate"))
        kept = sum(len(inputs) for _, inputs in changed)
        assert abs(kept - 100_000 * (1 - rate)) < 5 * np.sqrt(100_000 * rate * (1 - rate))
        changed = list(pairs(Denoising(infilling_rate=0, replacement_rate=rate), [100_000], "concatenate"))
        new = sum(a != b for old, inputs in changed for a, b in zip(old, inputs, strict=True))
        assert abs(new - 100_000 * rate * 255 / 256) < 5 * np.sqrt(100_000 * rate * (1 - rate))
    masked = list(pairs(Denoising(infilling_rate=0.3), [100_000], "concatenate"))
    hidden = sum(len(old) - len([token for token in inputs if token != MASK]) for old, inputs in masked)
    assert abs(hidden / 100_000 - 0.3) < 0.01
    assert abs(hidden / sum(inputs.count(MASK) for _, inputs in masked) - 3.0) < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"infilling_rate": 0.0}, "Denoising has no noise"),
        ({"deletion_rate": 1.0}, r"Denoising\.deletion_rate=1\.0"),
        ({"mean_span_length": 0.0}, r"Denoising\.mean_span_length=0\.0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Denoising(**fields)
