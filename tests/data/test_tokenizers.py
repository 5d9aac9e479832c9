import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import (
    ByteTokenizerConfig,
    CharacterTokenizer,
    CharacterTokenizerConfig,
    SpecialTokens,
    WordTokenizer,
    WordTokenizerConfig,
    cut,
    sample,
)
from t5x_like.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"))


@dataclasses.dataclass
class Texts:
    """Documents of a test: the last is validation."""

    texts: list[str]

    def train(self):
        return iter(self.texts[:-1])

    def all(self):
        return iter(self.texts)


@given(TEXT)
def test_bytes_are_numbered_as_in_byt5(text):
    tokenizer = ByteTokenizerConfig().build(Texts([]))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    # The example of the ByT5 documentation: bytes plus three special ids.
    assert ids.tolist() == [byte + 3 for byte in text.encode("utf-8")]
    assert tokenizer.decode([0, *ids, 1, 2, 300]) == text
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 259)


@given(st.lists(TEXT.filter(len), min_size=1))
def test_characters_are_nanogpts(texts):
    tokenizer = CharacterTokenizerConfig().build(Texts(texts))
    whole = "".join(texts)
    # nanoGPT, data/shakespeare_char/prepare.py.
    chars = sorted(set(whole))
    stoi = {ch: i for i, ch in enumerate(chars)}
    assert tokenizer.vocab_size == len(chars)
    assert tokenizer.encode(whole).tolist() == [stoi[c] for c in whole]
    assert tokenizer.decode(tokenizer.encode(whole)) == whole
    assert tokenizer.eos_id is tokenizer.bos_id is tokenizer.pad_id is None


@pytest.mark.parametrize("text", ["abz", "a\U0001f600b", "A"])
def test_unknown_characters_are_named(text):
    unknown = next(character for character in text if character not in "abc")
    with pytest.raises(UserError) as error:
        CharacterTokenizer("abc").encode(text)
    assert repr(unknown) in str(error.value)


def test_words_by_frequency_then_alphabet():
    documents = Texts(["b a b a a a c", "validation words do not count"])
    tokenizer = WordTokenizerConfig(vocab_size=6).build(documents)
    assert tokenizer.words == (" a", " b", " c")
    assert tokenizer.encode("c a d b").tolist() == [2, 3, 2, 4]
    assert tokenizer.decode([0, 3, 2, 5, 1, 99]) == " a<unk> c"


@given(TEXT)
def test_known_words_lose_nothing(text):
    tokenizer = WordTokenizer(sorted({word for _, word in cut(text, 1)} | set(_words(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _words(text):
    from t5x_like.data import tokenizers

    return tokenizers._WORD.findall(text)


def test_more_words_than_there_are():
    with pytest.raises(UserError, match="larger than the corpus allows: set it to 5 or less"):
        WordTokenizerConfig(vocab_size=6).build(Texts(["a b", ""]))
    assert WordTokenizerConfig(vocab_size=5).build(Texts(["a b", ""])).vocab_size == 5


@given(st.text("ab\n"), st.integers(1, 9))
def test_cut_keeps_everything_within_the_size(text, size):
    pieces = list(cut(text, size))
    assert "".join(piece for _, piece in pieces) == text
    assert all(0 < len(piece) <= size and text.startswith(piece, start) for start, piece in pieces)
    # A cut within a line only where the line is longer than a piece.
    assert all(piece.endswith("\n") or len(piece) == size for _, piece in pieces[:-1])


def test_sample_is_bounded_and_from_everywhere():
    texts = [f"{i:04}\n" * 10 for i in range(1000)]
    part = sample(texts, 5000, piece=50)
    assert 2500 <= sum(map(len, part)) <= 5000
    numbers = [int(text[:4]) for text in part]
    assert len(set(np.diff(numbers))) == 1
    assert numbers[0] == 0
    assert numbers[-1] > 900
    assert sample(texts, 10**6, piece=50) == texts


SPECIAL = SpecialTokens(names=("[MASK]", "[CLS]", "[SEP]"), num_sentinels=4)


@pytest.mark.parametrize(
    "config",
    [
        ByteTokenizerConfig(special_tokens=SPECIAL),
        CharacterTokenizerConfig(special_tokens=SPECIAL),
        WordTokenizerConfig(vocab_size=5, special_tokens=SPECIAL),
        SentencePieceConfig(vocab_size=275, special_tokens=SPECIAL),
    ],
)
def test_special_tokens_follow_the_vocabulary(config):
    documents = Texts([" two words" * 50, ""])
    tokenizer, plain = config.build(documents), config.build_plain(documents)
    size, text = plain.vocab_size, " two words words"
    assert tokenizer.vocab_size == size + 7
    assert (tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id) == (size, size + 1, size + 2)
    # T5: the first sentinel has the last id.
    assert [tokenizer.sentinel(number) for number in range(4)] == [size + 6, size + 5, size + 4, size + 3]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (plain.pad_id, plain.eos_id, plain.bos_id)
    ids = plain.encode(text).tolist()
    assert tokenizer.encode(text).tolist() == tokenizer.encode_batch([text])[0].tolist() == ids
    shown = tokenizer.decode([size + 1, *ids, size + 6, 10**6, size, *ids])
    assert shown == f"[CLS]{text}<extra_id_0>[MASK]{text}"
    assert tokenizer.fingerprint() != plain.fingerprint()
    assert tokenizer.token_bytes() == plain.token_bytes() + [b""] * 7
    assert b"".join(tokenizer.token_bytes()[i] for i in ids).decode() == text
    with pytest.raises(UserError, match=r"4 sentinels and sentinel 4 is needed: set SpecialTokens.num_sentinels to 5"):
        tokenizer.sentinel(4)
    with pytest.raises(UserError, match=r"no token \[R\]: add it to SpecialTokens.names"):
        tokenizer.special_id("[R]")


def test_no_special_tokens_change_nothing():
    tokenizer = ByteTokenizerConfig().build(Texts([]))
    assert (tokenizer.vocab_size, tokenizer.num_sentinels, dict(tokenizer.special_ids)) == (259, 0, {})
    assert list(tokenizer.files()) == ["vocabulary.json"]


@pytest.mark.parametrize("fields", [{"names": ("[A]", "[A]")}, {"names": ("",)}, {"num_sentinels": -1}])
def test_bad_special_tokens(fields):
    with pytest.raises(UserError, match=rf"SpecialTokens\.{next(iter(fields))}="):
        SpecialTokens(**fields)
