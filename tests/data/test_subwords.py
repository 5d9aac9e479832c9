import functools

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.data.subwords import SentencePieceConfig, SentencePieceFileConfig
from t5x_like.data.tokenizers import SpecialTokens
from t5x_like.errors import UserError


class Docs:
    def train(self):
        return PythonLibrarySource(parts=("docs",)).documents()

    all = train


@functools.cache
def trained(model_type):
    return SentencePieceConfig(vocab_size=1000, model_type=model_type).build(Docs())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))
@example(text="    def f(x):\r\n\t\treturn  x\n\n\n")
@example(text="<unk></s> \0 \ufeff\u2585 日本")
def test_round_trip_loses_nothing(model_type, text):
    tokenizer = trained(model_type)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode([0, *ids, 1, 10**6]) == text
    assert tokenizer.encode_batch([text, "", text])[2].tolist() == ids.tolist()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_and_compresses(model_type, tmp_path):
    tokenizer = trained(model_type)
    again = SentencePieceConfig(vocab_size=1000, model_type=model_type).build(Docs())
    assert tokenizer.fingerprint() == again.fingerprint()
    assert tokenizer.vocab_size == 1000
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 1)
    texts = list(Docs().train())
    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    assert sum(map(len, texts)) / num_tokens > 2.5
    assert len(tokenizer.encode(" " * 16)) <= 2

    # The library itself reads the saved model, and so does our configuration.
    tokenizer.save(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    loaded = SentencePieceFileConfig(model_file=str(tmp_path / "spiece.model")).build(Docs())
    assert model.encode(texts[0]) == tokenizer.encode(texts[0]).tolist() == loaded.encode(texts[0]).tolist()


def test_special_ids_of_a_model_are_kept(tmp_path):
    with open(tmp_path / "m.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=Docs().train(), model_writer=file, vocab_size=500, minloglevel=2
        )
    tokenizer = SentencePieceFileConfig(model_file=str(tmp_path / "m.model")).build(Docs())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)


def test_special_tokens_of_a_model_are_used(tmp_path):
    with open(tmp_path / "m.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=Docs().train(),
            model_writer=file,
            vocab_size=500,
            user_defined_symbols=["<extra_id_1>", "<extra_id_0>", "[S2S]"],
            minloglevel=2,
        )
    special = SpecialTokens(names=("[S2S]", "[MASK]"), num_sentinels=3)
    tokenizer = SentencePieceFileConfig(model_file=str(tmp_path / "m.model"), special_tokens=special).build(Docs())
    assert tokenizer.vocab_size == 502
    assert [tokenizer.sentinel(number) for number in range(3)] == [4, 3, 501]
    assert (tokenizer.special_id("[S2S]"), tokenizer.mask_id) == (5, 500)
    assert [tokenizer.token_bytes()[i] for i in (0, 1, 2, 3, 4, 5, 500)] == [b""] * 7
    assert tokenizer.decode([4, 500]) == "<extra_id_0>[MASK]"


def test_bytes_of_tokens_spell_the_text():
    tokenizer = trained("bpe")
    text = "  two\n\u65e5\u672c caf\u00e9 \u2585"
    assert b"".join(tokenizer.token_bytes()[i] for i in tokenizer.encode(text)).decode() == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_that_does_not_fit(model_type):
    class Few:
        def train(self):
            return iter(["the cat and the other cat sat on the mat\n" * 3])

    with pytest.raises(UserError, match=r"vocab_size=5000 is larger .* set it to (\d+) or less") as error:
        SentencePieceConfig(vocab_size=5000, model_type=model_type).build(Few())
    largest = int(str(error.value).split("set it to ")[1].split()[0])
    assert SentencePieceConfig(vocab_size=largest, model_type=model_type).build(Few()).vocab_size == largest
    with pytest.raises(UserError, match=r"vocab_size=100 is smaller .* set it to \d+ or more"):
        SentencePieceConfig(vocab_size=100, model_type=model_type).build(Few())


def test_bad_model_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read it: .*none\.model"):
        SentencePieceFileConfig(model_file=str(tmp_path / "none.model")).build(Docs())
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
        SentencePieceFileConfig(model_file=str(tmp_path / "bad.model")).build(Docs())
