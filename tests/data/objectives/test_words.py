import functools

import numpy as np
import pytest

from t5x_like.data.objectives.words import Edges, text_ids
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import SpecialTokens, WordTokenizer
from tests.data.objectives import toy
from tests.data.test_subwords import Docs


@functools.cache
def subwords():
    return SentencePieceConfig(vocab_size=600, special_tokens=toy.SPECIAL).build(Docs())


TOKENIZERS = pytest.mark.parametrize("tokenizer", [lambda: toy.TOKENIZER, subwords], ids=["bytes", "subwords"])


@TOKENIZERS
def test_words_are_whole(tokenizer):
    tokenizer = tokenizer()
    tokens = tokenizer.encode("  It's a_name, 3.5 cafés!\nNext line (see `x`).  Done? Yes")
    begins = Edges(tokenizer).begin_words(tokens, np.arange(len(tokens)) == 0)
    found = [tokenizer.decode(part).strip() for part in np.split(tokens, np.flatnonzero(begins)[1:])]
    # Marks stand alone or with a neighbour, as tokens have it.
    words = [word for part in found if (word := part.strip("'`.,!?()\n "))]
    assert words == ["It", "s", "a_name", "3", "5", "cafés", "Next", "line", "see", "x", "Done", "Yes"]


@TOKENIZERS
def test_sentences_end_at_marks_before_space_and_at_line_ends(tokenizer):
    tokenizer = tokenizer()
    tokens = tokenizer.encode("See f.x, i.e. this.  Why? 3.5!\nNext line\n    indented (so.) End")
    tokens = [*tokens, toy.EOS, *tokenizer.encode("New")]
    ends = np.flatnonzero(Edges(tokenizer).end_sentences(np.array(tokens))) + 1
    found = [tokenizer.decode(part).strip() for part in np.split(tokens, ends)]
    whole = ["See f.x, i.e.", "this.", "Why?", "3.5!", "Next line", "indented (so.)", "End", "New"]
    # A byte at a time, a mark in brackets has no space behind it.
    parts = "\n".join(sentence for sentence in found if sentence)
    assert parts in ("\n".join(whole), "\n".join(whole).replace("(so.)\n", "(so.) "))


def test_ids_with_text():
    assert text_ids(toy.TOKENIZER).tolist() == list(range(3, 259))
    extended = SpecialTokens(names=("[MASK]",)).extend(WordTokenizer(["a", "b"]))
    assert text_ids(extended).tolist() == [3, 4]
