import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data import shards as module
from t5x_like.data.corpus import prepare_corpus
from t5x_like.data.prepared import PreparedSource, PreparedTokenizerConfig
from t5x_like.data.shards import PREPARED, TOKENIZER, Shards, ShardWriter
from t5x_like.data.splits import Split
from t5x_like.data.tokenizers import ByteTokenizer, CharacterTokenizerConfig, TokenizerConfig
from t5x_like.data.tokens import token_dtype
from t5x_like.errors import UserError

TEXTS = tuple(f"Document {i}\nhas line {i}.\n" * (i % 7 + 1) for i in range(40))
SPLIT = Split("document", 0.3)


class BosBytes(ByteTokenizer):
    bos_id = 2


@dataclasses.dataclass(frozen=True)
class Texts:
    texts: tuple[str, ...] = TEXTS

    def documents(self):
        return iter(self.texts)

    all = train = documents

    def cache_key(self):
        return ""


@dataclasses.dataclass(frozen=True)
class Given(TokenizerConfig):
    tokenizer: object

    def build_plain(self, documents):
        return self.tokenizer


def write(directory, tokenizer, texts=TEXTS, per_shard=15):
    (directory / TOKENIZER).mkdir(parents=True)
    tokenizer.save(directory / TOKENIZER)
    listed = []
    for start in range(0, len(texts), per_shard):
        writer = ShardWriter(directory / f"{start:05}", tokenizer)
        for text in texts[start : start + per_shard]:
            writer.write(text)
        listed.append(writer.close()._asdict())
    record = {"dtype": token_dtype(tokenizer.vocab_size), "tokenizer": tokenizer.fingerprint(), "shards": listed}
    (directory / PREPARED).write_text(json.dumps(record))
    return directory


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), BosBytes(), CharacterTokenizerConfig().build(Texts())], ids=["eos", "bos", "bare"]
)
@pytest.mark.parametrize("record_tokens", [7, 2**14])
def test_shards_hold_the_corpus_that_a_run_would_prepare(tmp_path, monkeypatch, tokenizer, record_tokens):
    monkeypatch.setattr(module, "RECORD_TOKENS", record_tokens)
    shards = Shards(write(tmp_path / "corpus", tokenizer), tokenizer)
    expected = prepare_corpus(Texts(), Given(tokenizer), SPLIT, None)
    validates = shards.index["hash"] < np.uint64(int(0.3 * 2**64))
    for selected, tokens in ((~validates, expected.train), (validates, expected.validation)):
        ours = shards.tokens(selected)
        assert len(ours.stream) == len(tokens.stream)
        assert np.array_equal(ours.stream[:], tokens.stream)
        assert ours.stream.dtype == tokens.stream.dtype
        assert np.array_equal(ours.starts, tokens.starts)
        assert np.array_equal(ours.ends, tokens.ends)
        assert ours.num_bytes == tokens.num_bytes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards") / "corpus", ByteTokenizer())


@given(st.data())
def test_any_places_in_any_order(corpus, data):
    stream = Shards(corpus, ByteTokenizer()).tokens(np.ones(len(TEXTS), bool)).stream
    whole = np.array([1, *(t for text in TEXTS for t in [*ByteTokenizer().encode(text), 1])])
    places = np.array(data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=30)), np.int64)
    runs = places[:, None] + np.arange(5)
    for wanted in (places, np.minimum(runs, len(stream) - 1)):
        assert np.array_equal(stream[wanted], whole[wanted])
        assert stream[wanted].shape == wanted.shape
    start, stop = data.draw(st.integers(-5, 600)), data.draw(st.integers(-5, 600))
    assert np.array_equal(stream[start:stop], whole[start:stop])


def test_places_outside_are_refused(corpus):
    stream = Shards(corpus, ByteTokenizer()).tokens(np.ones(len(TEXTS), bool)).stream
    for place in (-1, len(stream)):
        with pytest.raises(IndexError, match="places from 0 to"):
            stream[np.array([place])]
    empty = Shards(corpus, ByteTokenizer()).tokens(np.zeros(len(TEXTS), bool))
    assert empty.stream[:].tolist() == [1]
    assert len(empty.starts) == 0


def test_missing_and_damaged_shards(corpus, tmp_path, caplog):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    (broken / "00000.array_record").unlink()
    (broken / "00015.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 damaged shards of 3: 00000 \(missing\); 00015 .*max_bad_shards = 2"):
        Shards(broken, ByteTokenizer(), max_bad_shards=1)
    left = PreparedSource(directory=str(broken), max_bad_shards=2).corpus(SPLIT)
    whole = PreparedSource(directory=str(corpus)).corpus(SPLIT)
    assert len(left.train.starts) + len(left.validation.starts) == 10
    assert left.fingerprint != whole.fingerprint
    assert (broken / "00030.array_record").exists()
    with open(broken / "00030.array_record", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"00030 .another size than when it was written"):
        Shards(broken, ByteTokenizer(), max_bad_shards=2)


def test_flipped_bits_are_noticed_when_they_are_read(corpus, tmp_path):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    content = bytearray((broken / "00015.array_record").read_bytes())
    # The middle of the first record's text, which stands there uncompressed.
    at = content.find(np.array([ord(c) + 3 for c in "Document 15"], "<u2").tobytes())
    content[at] ^= 1
    (broken / "00015.array_record").write_bytes(content)
    stream = Shards(broken, ByteTokenizer()).tokens(np.ones(len(TEXTS), bool)).stream
    assert len(stream[:10]) == 10
    with pytest.raises(UserError, match=r"00015\.array_record is damaged .*remove it and set max_bad_shards"):
        stream[:]


def test_another_tokenizer_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="tokenised with another tokenizer"):
        Shards(corpus, CharacterTokenizerConfig().build(Texts()))
    changed = tmp_path / "corpus"
    shutil.copytree(corpus, changed)
    CharacterTokenizerConfig().build(Texts()).save(changed / TOKENIZER)
    with pytest.raises(UserError, match="tokenised with another tokenizer"):
        PreparedSource(directory=str(changed)).corpus(SPLIT)
    shutil.rmtree(changed / TOKENIZER)
    with pytest.raises(UserError, match="bring the tokenizer back"):
        PreparedTokenizerConfig(directory=str(changed)).build(Texts())


def test_what_is_no_corpus(tmp_path):
    with pytest.raises(UserError, match=r"holds no prepared corpus .*t5x_like prepare --from=FILES --to="):
        PreparedSource(directory=str(tmp_path)).corpus(SPLIT)
    (tmp_path / PREPARED).write_text("{")
    with pytest.raises(UserError, match=r"prepared\.json cannot be read"):
        PreparedSource(directory=str(tmp_path)).corpus(SPLIT)


def test_documents_are_split_by_their_hashes_only(corpus):
    with pytest.raises(UserError, match=r"DataConfig.split='position': .*set it to 'document'"):
        PreparedSource(directory=str(corpus)).corpus(Split("position", 0.1))
