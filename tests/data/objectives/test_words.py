import numpy as np

from t5x_like.data.objectives.words import WordEdges, sentence_ends, text_ids
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import SpecialTokens, WordTokenizer
from tests.data.objectives import toy
from tests.data.test_subwords import Docs

TEXT = "  It's a_name, 3.5 caf\u00e9s!\nNext line (see `x`).  Done? Yes"


def words(tokenizer, text):
    tokens = tokenizer.encode(text)
    begins = WordEdges(tokenizer).begins(tokens, np.arange(len(tokens)) == 0)
    parts = np.split(tokens, np.flatnonzero(begins)[1:])
    return [tokenizer.decode(part).strip() for part in parts]


def test_words_are_whole_in_every_tokenizer():
    letters = ["It", "s", "a_name", "3", "5", "cafés", "Next", "line", "see", "x", "Done", "Yes"]
    bpe = SentencePieceConfig(vocab_size=600, special_tokens=toy.SPECIAL).build(Docs())
    for tokenizer in (toy.TOKENIZER, bpe):
        found = [word for word in words(tokenizer, TEXT) if word.strip("_").isalnum() or "_" in word]
        assert found == letters
        assert "".join(words(tokenizer, TEXT)) == "".join(TEXT.split())


def test_sentences_end_at_marks_and_line_ends():
    tokens = toy.TOKENIZER.encode(TEXT)
    ends = sentence_ends(toy.TOKENIZER)[tokens]
    assert [TEXT.encode()[i] for i in np.flatnonzero(ends)] == list(b".!\n.?")
    assert sentence_ends(toy.TOKENIZER)[toy.EOS]
    words = WordTokenizer([" end", ".", '."', " x\n", "e.g"])
    assert sentence_ends(words).tolist() == [False, True, False, False, True, True, True, False]


def test_ids_with_text():
    assert text_ids(toy.TOKENIZER).tolist() == list(range(3, 259))
    extended = SpecialTokens(names=("[MASK]",)).extend(WordTokenizer(["a", "b"]))
    assert text_ids(extended).tolist() == [3, 4]
