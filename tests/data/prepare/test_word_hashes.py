import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.prepare.word_hashes import Words, repeated

TEXTS = st.text(st.sampled_from("ab cd\n\t.,-é日本\U0001d4b3"), max_size=60)


def ngrams(parts, size):
    return [tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)]


def same_classes(hashes, values):
    """Hashes are equal exactly where the values are."""
    codes = {value: number for number, value in enumerate(dict.fromkeys(values))}
    _, first = np.unique(np.array([codes[value] for value in values]), return_index=True)
    return len(set(hashes.tolist())) == len(codes) and all(
        hashes[i] == hashes[first[codes[value]]] for i, value in enumerate(values)
    )


@given(TEXTS)
def test_words_are_what_stands_between_spaces(text):
    words = Words(text, normalized=False)
    parts = re.split(r"[ \n\t]+", text.strip(" \n\t"))
    parts = [part for part in parts if part]
    assert words.lengths.tolist() == list(map(len, parts))
    assert same_classes(words.hashes, parts)
    for size in (1, 2, 5):
        assert len(words.ngrams(size)) == max(len(parts) - size + 1, 0)
        assert same_classes(words.ngrams(size), ngrams(parts, size))


@given(TEXTS)
def test_normalized_words_are_letters_and_digits_with_ideographs_alone(text):
    words = Words(text.upper(), normalized=True)
    parts = re.findall("[日本]|[abcdé\U0001d4b3]+", text)
    assert words.lengths.tolist() == list(map(len, parts))
    assert same_classes(words.hashes, parts)


def test_hashes_are_the_same_for_ever():
    # Signatures of one preparation may meet those of another.
    assert Words("the cat", normalized=True).hashes.tolist() == [4435022345927530939, 9854805019599841898]
    assert Words("a the\ncat", normalized=False).hashes[1:].tolist() == [4435022345927530939, 9854805019599841898]


def test_long_texts_take_another_table_of_powers():
    text = "word " * 20_000 + "end"
    hashes = Words(text, normalized=False).hashes
    assert len(hashes) == 20_001
    assert len(set(hashes.tolist())) == 2
    assert hashes[-1] == Words("end", normalized=False).hashes[0]


@given(st.lists(st.integers(0, 5)))
def test_repeated_marks_all_but_the_first(values):
    marks = repeated(np.array(values, np.uint64))
    assert marks.tolist() == [value in values[:i] for i, value in enumerate(values)]
