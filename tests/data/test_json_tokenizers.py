import json

import numpy as np
import pytest

from t5x_like.data.json_tokenizers import ByteBPEConfig, JsonTokenizer, TokenizerFileConfig, WordPieceConfig
from t5x_like.data.tokenizers import SpecialTokens, read_tokenizer
from t5x_like.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

TEXT = "The déjà-vu of tokenizers: 42 cats\n\tsat, they said.  Then 43 cats sat!\n" * 20
SPECIAL = SpecialTokens(names=("[CLS]", "[SEP]", "[MASK]"))


class Documents:
    def train(self):
        yield TEXT

    all = train


@pytest.fixture(scope="module")
def byte_level():
    return ByteBPEConfig(vocab_size=290, special_tokens=SPECIAL).build(Documents())


def test_byte_level_loses_nothing(byte_level):
    text = TEXT + "ünïcode \U0001f600 <|endoftext|> [CLS]"
    tokens = byte_level.encode(text)
    assert byte_level.decode(tokens) == text
    assert b"".join(byte_level.token_bytes()[i] for i in tokens) == text.encode()
    assert len(tokens) < len(text.encode()) * 0.7
    assert byte_level.eos_id == byte_level.bos_id == 0
    assert byte_level.vocab_size == 293


def test_special_tokens_are_not_found_in_text(byte_level):
    special = {*byte_level.special_ids.values(), byte_level.eos_id}
    assert not special & {*byte_level.encode("<|endoftext|>[CLS][SEP] text").tolist()}


def test_word_pieces():
    tokenizer = WordPieceConfig(vocab_size=73, special_tokens=SPECIAL).build(Documents())
    tokens = tokenizer.encode("Cats SAT, déjà!")
    assert tokenizer.decode(tokens) == "cats sat, deja!"
    assert b"".join(tokenizer.token_bytes()[i] for i in tokens) == b" cats sat , deja !"
    assert tokenizer.pad_id == 0
    assert tokenizer.encode("\u4e2d").tolist() == [tokenizer.base.unk_id]
    assert tokenizer.cls_id == tokenizer.vocab_size - 3


@pytest.mark.parametrize("config", [ByteBPEConfig(vocab_size=280), WordPieceConfig(vocab_size=60)])
def test_it_is_the_same_after_it_was_kept_and_when_trained_again(config, tmp_path):
    tokenizer = config.build(Documents())
    tokenizer.save(tmp_path)
    kept = read_tokenizer(tmp_path)
    assert kept.fingerprint() == tokenizer.fingerprint() == config.build(Documents()).fingerprint()
    np.testing.assert_array_equal(kept.encode(TEXT), tokenizer.encode(TEXT))
    assert [ids.tolist() for ids in kept.encode_batch(["cats", "sat"])] == [
        kept.encode("cats").tolist(),
        kept.encode("sat").tolist(),
    ]


def test_files_of_families_are_read(tmp_path):
    """A Llama-like file: byte fallback, spaces as U+2581, tokens of usual names, ids with a gap."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581cat": 3, "s": 4, "<0x21>": 5, "\u2581": 6}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_special_tokens([tokenizers.AddedToken("<|im_end|>", special=True)])
    library.enable_truncation(2)
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    tokenizer = TokenizerFileConfig(file=str(path)).build(None)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.special_id("<|im_end|>") == 7
    assert tokenizer.token_bytes() == [b"", b"", b"", b" cat", b"s", b"!", b" ", b""]
    assert len(tokenizer.encode("cat cat cat")) == 3
    other = TokenizerFileConfig(file=str(path), eos_token="<|im_end|>").build(None)
    assert other.eos_id == 7
    with pytest.raises(UserError, match="has no token '<end>'"):
        TokenizerFileConfig(file=str(path), eos_token="<end>").build(None)


def test_mistakes(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="cannot read it"):
        TokenizerFileConfig(file=str(path)).build(None)
    path.write_text(json.dumps({"model": {"type": "none"}}))
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        TokenizerFileConfig(file=str(path)).build(None)
    with pytest.raises(UserError, match=r"vocab_size=500 is larger than the corpus allows: set it to \d+ or less"):
        ByteBPEConfig(vocab_size=500).build(Documents())
    with pytest.raises(UserError, match=r"vocab_size=20 is smaller than the text's letters: set it to \d+ or more"):
        WordPieceConfig(vocab_size=20).build(Documents())
    with pytest.raises(UserError, match="at least 257"):
        ByteBPEConfig(vocab_size=100)


def test_the_whole_file_decides_what_it_is():
    tokenizer = ByteBPEConfig(vocab_size=270).build(Documents())
    content = tokenizer.files()["tokenizer.json"]
    assert JsonTokenizer(content).fingerprint() == tokenizer.fingerprint()
    assert JsonTokenizer(content, {"pad": "cat"[:1]}).fingerprint() != tokenizer.fingerprint()
