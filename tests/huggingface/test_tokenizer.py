"""The tokenizers that Hugging Face directories hold."""

import json

import pytest

from t5x_like.data.json_tokenizers import ByteBPEConfig
from t5x_like.data.subwords import MODEL_FILE, SentencePieceConfig
from t5x_like.errors import UserError
from t5x_like.huggingface.tokenizer import tokenizer_config


class Texts:
    def train(self):
        return iter(["the cat sat on a mat and then it ran away from the dog " * 40])

    all = train


def test_a_tokenizer_json_names_its_tokens_beside_it(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the extra: tasks")
    content = ByteBPEConfig(vocab_size=280).build(Texts()).files()["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert tokenizer_config(tmp_path).build(()).eos_id == 0
    settings = {"bos_token": None, "eos_token": {"content": "a", "special": True}, "pad_token": "b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_config(tmp_path).build(())
    assert (tokenizer.eos_id, tokenizer.pad_id) == tuple(tokenizer.encode("ab").tolist())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "gone"}')
    with pytest.raises(UserError, match=r"has no token .gone."):
        tokenizer_config(tmp_path).build(())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json cannot be read"):
        tokenizer_config(tmp_path)


def test_a_sentencepiece_model_gets_the_sentinels_that_it_lacks(tmp_path):
    trained = SentencePieceConfig(vocab_size=300).build(Texts())
    (tmp_path / "spiece.model").write_bytes(trained.files()[MODEL_FILE])
    assert tokenizer_config(tmp_path).build(()).vocab_size == 300
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    tokenizer = tokenizer_config(tmp_path).build(())
    assert [tokenizer.special_ids[f"<extra_id_{i}>"] for i in range(3)] == [302, 301, 300]


def test_a_directory_without_one_is_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer.json nor tokenizer.model, spiece.model.*AutoTokenizer"):
        tokenizer_config(tmp_path)
