import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.objectives.masked import MaskedLM
from t5x_like.data.objectives.words import Edges
from t5x_like.data.tokenizers import ByteTokenizerConfig
from t5x_like.data.tokens import Tokens
from t5x_like.errors import UserError
from tests.data.objectives import toy

MASK, CLS, SEP = toy.TOKENIZER.mask_id, toy.TOKENIZER.cls_id, toy.TOKENIZER.sep_id
STOP, SPACE = toy.TOKENIZER.encode(". ").tolist()
LENGTHS = st.lists(st.integers(1, 60), min_size=2, max_size=20)


def near(count, total, probability):
    return abs(count - total * probability) < 5 * np.sqrt(total * probability * (1 - probability))


@given(LENGTHS, st.booleans(), st.sampled_from(["concatenate", "pack", "documents"]), st.integers(0, 5))
def test_what_masking_preserves(lengths, whole_words, layout, seed):
    objective = MaskedLM(mask_rate=0.4, whole_words=whole_words)
    text, rows = toy.rows_in_order(objective, toy.text(lengths), length=24, layout=layout, seed=seed)
    inputs, targets, weights = (rows[f"encoder_{name}"] for name in ("input_tokens", "target_tokens", "loss_weights"))
    assert (inputs[weights == 0] == targets[weights == 0]).all()
    special = np.isin(targets, [toy.EOS, CLS, SEP]) | (rows["encoder_segment_ids"] == 0)
    assert (weights[special] == 0).all()
    # A random token is text; only chosen tokens are hidden.
    assert (inputs[weights == 1] != toy.EOS).all()
    assert not np.isin(inputs[weights == 1], [CLS, SEP]).any()
    pieces = {(row, number): targets[row][where].tolist() for row, number, where in toy.segments(rows, "encoder")}
    assert pieces == {place: [CLS, *tokens, SEP] for place, tokens in toy.pieces_of(text).items()}
    for row, _, where in toy.segments(rows, "encoder"):
        assert rows["encoder_positions"][row][where].tolist() == list(range(where.sum()))


def test_rates_are_berts():
    _, rows = toy.rows_in_order(MaskedLM(), toy.text([400_000]), length=128)
    inputs, targets, chosen = (rows[f"encoder_{name}"] for name in ("input_tokens", "target_tokens", "loss_weights"))
    candidates = ~np.isin(targets, [toy.EOS, CLS, SEP, 0])
    num_chosen = int(chosen.sum())
    assert near(num_chosen, candidates.sum(), 0.15)
    assert near((inputs == MASK).sum(), num_chosen, 0.8)
    changed = (inputs != MASK) & (inputs != targets)
    # Of the random tokens one in 256 is the same by chance.
    assert near(changed.sum(), num_chosen, 0.1 * 255 / 256)
    drawn = np.bincount(inputs[changed], minlength=259)
    assert (drawn[3:259] > 0).all()
    assert drawn[259:].sum() == drawn[:3].sum() == 0
    # No place in a row is special.
    assert near(chosen[:-1, 1:-1].mean(axis=0).max() * len(chosen), len(chosen), 0.15)


def test_rates_that_are_asked_for():
    _, rows = toy.rows_in_order(MaskedLM(mask_rate=0.5, keep_rate=0.0, replace_rate=0.0), toy.text([50_000]), length=64)
    chosen = rows["encoder_loss_weights"] == 1
    assert near(chosen.sum(), 50_000, 0.5)
    assert ((rows["encoder_input_tokens"] == MASK) == chosen).all()


def test_whole_words_are_chosen_together():
    words = " ".join(f"word{i * 7919 % 1000}" for i in range(4000))
    stream = np.append(toy.EOS, toy.TOKENIZER.encode(words))
    tokens = Tokens(stream, np.array([1]), np.array([len(stream)]), 0)
    _, rows = toy.rows_in_order(MaskedLM(whole_words=True), tokens, length=100)
    edges, chosen = Edges(toy.TOKENIZER), []
    for targets, weights in zip(rows["encoder_target_tokens"][:-1], rows["encoder_loss_weights"], strict=False):
        begins = edges.begin_words(targets, np.arange(len(targets)) == 0)
        chosen += np.split(weights, np.flatnonzero(begins)[1:])
    assert all(word.min() == word.max() for word in chosen)
    long = [word[0] for word in chosen if len(word) > 4]
    assert len(long) > 3000
    assert near(sum(long), len(long), 0.15)


def documents(number, length):
    """Document d has letters 100 + d alone, and at every fifth place a full stop with a space behind it."""
    lengths = np.full(number, length)
    ends = np.cumsum(lengths) + 1
    place = np.arange(length) % 5
    stops = np.where(place == 3, STOP, np.where(place == 4, SPACE, 0))
    stream = [toy.EOS, *(stop or 100 + d for d in range(number) for stop in stops)]
    return Tokens(np.array(stream), ends - lengths, ends, 0)


def halves(rows):
    """Yields (label, first text, second text) of rows whose pair counts."""
    for row in np.flatnonzero(rows["pair_weights"]):
        tokens, types = rows["encoder_target_tokens"][row], rows["encoder_token_types"][row]
        where = rows["encoder_segment_ids"][row] == 1
        assert (np.diff(types[where]) >= 0).all()
        first, second = tokens[where & (types == 0)], tokens[where & (types == 1)]
        assert (first[0], first[-1], second[-1]) == (CLS, SEP, SEP)
        yield rows["pair_labels"][row], first[1:-1], second[:-1]


def test_next_sentences():
    tokens = documents(60, 90)
    text, rows = toy.rows_in_order(MaskedLM(pairs="next"), tokens, length=48, layout="documents")
    assert (rows["pair_weights"] == 1).all()
    originals, partners = list(toy.pieces_of(text).values()), set()
    for (label, first, second), original in zip(halves(rows), originals, strict=True):
        assert original[: len(first)] == first.tolist()
        assert first[-1] == STOP
        assert len(second) <= len(original) - len(first)
        if label:
            partners |= set(second)
            assert not (set(first) - {STOP, SPACE}) & set(second)
        else:
            assert [*first, *second] == original
    assert near(rows["pair_labels"].sum(), len(originals), 0.5)
    assert len(partners) > 30


def test_sentence_order():
    tokens = documents(60, 90)
    text, rows = toy.rows_in_order(MaskedLM(pairs="order"), tokens, length=48, layout="documents")
    originals = list(toy.pieces_of(text).values())
    for (label, first, second), original in zip(halves(rows), originals, strict=True):
        assert original == ([*second, *first] if label else [*first, *second])
    assert near(rows["pair_labels"].sum(), len(originals), 0.5)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.sampled_from(["next", "order"]), st.integers(0, 5))
def test_pairs_of_any_lengths(lengths, pairs, seed):
    objective = MaskedLM(pairs=pairs)
    _, rows = toy.rows_in_order(objective, toy.text(lengths), length=16, layout="documents", seed=seed)
    for name, (shape, dtype) in objective.features(16, packed=False).items():
        assert rows[name].shape[1:] == shape
        assert rows[name].dtype == dtype
    for _, first, second in halves(rows):
        assert len(first) > 0
        assert len(second) > 0
    # Only a piece of one token has no pair, or meets no pair.
    assert (rows["pair_labels"][rows["pair_weights"] == 0] == 0).all()


def test_missing_tokens_are_named():
    with pytest.raises(UserError, match=r"no token \[MASK\]: add it to SpecialTokens.names .*special_tokens"):
        MaskedLM().build(ByteTokenizerConfig().build(None), 16, packed=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_rate": 0.0}, "nothing would be predicted"),
        ({"mask_rate": 1.5}, r"MaskedLM\.mask_rate=1\.5"),
        ({"keep_rate": 0.6, "replace_rate": 0.6}, "more than 1 together"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        MaskedLM(**fields)
