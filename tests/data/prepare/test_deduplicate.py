import functools
import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.prepare.deduplicate import (
    estimated_similarity,
    first_occurrences,
    first_of_components,
    similar_pairs,
)
from t5x_like.data.prepare.signatures import (
    NearDuplicates,
    line_hashes,
    shingle_hashes,
    signature,
    without_repeated_lines,
)
from t5x_like.errors import UserError


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3)), st.integers(1, 5))
def test_first_occurrences(values, num_parts):
    found = first_occurrences(np.array(values, np.uint64), num_parts)
    assert found.tolist() == [value not in values[:i] for i, value in enumerate(values)]


@given(
    st.integers(1, 12), st.lists(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=8), max_size=3)
)
def test_first_of_components_against_plain_search(count, batches):
    batches = [[(a % count, b % count) for a, b in batch] for batch in batches]
    pairs = [pair for batch in batches for pair in batch]
    first = first_of_components([np.array(batch, np.int64).reshape(-1, 2) for batch in batches], count)
    for number in range(count):
        reached = {number}
        while more := {a for pair in pairs if reached & set(pair) for a in pair} - reached:
            reached |= more
        assert first[number] == min(reached)


def variants(seed, num_words=400):
    """A text and copies of it with more and more words replaced."""
    rng = random.Random(seed)
    words = [f"word{rng.randrange(10**6)}" for _ in range(num_words)]
    for changes in (0, 1, 3, 6, 10, 20, 40, 80):
        copy = list(words)
        for place in rng.sample(range(num_words), changes):
            copy[place] = f"other{rng.randrange(10**6)}"
        yield " ".join(copy)


@functools.cache
def shingles(text, size=5):
    words = text.split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_signatures_estimate_jaccard_similarity():
    config, errors = NearDuplicates(), []
    for seed in range(20):
        texts = list(variants(seed))
        bits = np.array([signature(text, config)[1] for text in texts])
        for i, j in itertools.combinations(range(len(texts)), 2):
            errors.append(estimated_similarity(bits[i : i + 1], bits[j : j + 1])[0] - jaccard(texts[i], texts[j]))
    # Of 256 hashes: sqrt(s (1 - s) / 256) is 0.031 at most.
    assert abs(np.mean(errors)) < 0.01
    assert np.sqrt(np.mean(np.square(errors))) < 0.031
    assert np.abs(errors).max() < 0.15


def test_shingles_do_not_see_case_and_punctuation():
    assert np.array_equal(shingle_hashes("A cat, a DOG; a mouse!", 5), shingle_hashes("a cat a dog a mouse", 5))
    assert len(shingle_hashes("two words", 5)) == 1
    assert len(shingle_hashes("", 5)) == 0
    assert signature("", NearDuplicates())[0].shape == (32,)


def test_bands_find_what_is_similar_and_only_that():
    config = NearDuplicates()
    texts = [text for seed in range(15) for text in variants(seed)]
    signatures = [signature(text, config) for text in texts]
    bands, bits = (np.array(column) for column in zip(*signatures, strict=True))
    participates = np.ones(len(texts), bool)
    found = {tuple(sorted(p)) for b in bands.T for p in similar_pairs(b, bits, participates, config.threshold).tolist()}
    similarity = {p: jaccard(texts[p[0]], texts[p[1]]) for p in itertools.combinations(range(len(texts)), 2)}
    assert all(similarity[pair] > config.threshold - 0.1 for pair in found)
    first = first_of_components([np.array(sorted(found))], len(texts))
    close = [pair for pair, value in similarity.items() if value >= 0.8]
    assert len(close) > 50
    assert np.mean([first[a] == first[b] for a, b in close]) >= 0.95
    participates[::2] = False
    left_out = np.concatenate([similar_pairs(b, bits, participates, config.threshold) for b in bands.T])
    assert (left_out % 2 == 1).all()


def test_long_documents_are_hashed_in_parts():
    text = " ".join(f"word{i}" for i in range(10_000))
    words = text.split()
    half = " ".join(words[:5000])
    bits = [signature(t, NearDuplicates())[1][None] for t in (text, half)]
    assert abs(estimated_similarity(*bits)[0] - 0.5) < 0.12


def test_lines_are_the_same_if_their_letters_are():
    lines = [
        "Read more: our terms of use, 2024",
        "read more - OUR terms of use (2025)",
        "Read more about terms",
        "short",
    ]
    hashes = line_hashes(lines, 10)
    assert len(hashes) == 3
    assert hashes[0] == hashes[1] != hashes[2]
    kept = iter([True, False, True])
    assert without_repeated_lines("\n".join(lines), 10, kept) == "\n".join([lines[0], *lines[2:]])
    assert next(kept, None) is None


@pytest.mark.parametrize(("field", "value"), [("num_bands", 0), ("threshold", 0.0), ("threshold", 1.5)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(UserError, match=f"NearDuplicates.{field}={value}"):
        NearDuplicates(**{field: value})
