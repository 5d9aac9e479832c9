import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.data.corpus import load_tokenizer, prepare_corpus
from t5x_like.data.sources import TextSource
from t5x_like.data.splits import Split, SplitDocuments
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import (
    ByteTokenizer,
    ByteTokenizerConfig,
    CharacterTokenizerConfig,
    SpecialTokens,
    TokenizerConfig,
    WordTokenizerConfig,
)
from t5x_like.errors import UserError

BY_DOCUMENT = Split("document", 0.3)
BY_POSITION = Split("position", 0.1)


@dataclasses.dataclass(frozen=True)
class Texts:
    texts: tuple[str, ...]

    def documents(self):
        return iter(self.texts)

    def cache_key(self):
        return ""


SOURCE = Texts(tuple(f"Document {i}\nhas line {i}.\n" * (i % 7 + 1) for i in range(40)))
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=20)


@given(TEXTS, st.randoms())
def test_document_split_ignores_neighbours(texts, random):
    documents = SplitDocuments(Texts(tuple(texts)), BY_DOCUMENT)
    train, validation = list(documents.train()), list(documents.validation())
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    shuffled = random.sample(texts, len(texts))
    assert sorted(SplitDocuments(Texts(tuple(shuffled)), BY_DOCUMENT).train()) == sorted(train)


def test_document_split_takes_the_fraction():
    documents = SplitDocuments(Texts(tuple(f"text {i}" for i in range(10_000))), BY_DOCUMENT)
    assert abs(len(list(documents.validation())) - 3000) < 5 * np.sqrt(10_000 * 0.3 * 0.7)


@given(TEXTS)
def test_position_split_is_nanogpts(texts):
    documents = SplitDocuments(Texts(tuple(texts)), BY_POSITION)
    data = "".join(texts)
    n = len(data)
    # nanoGPT, data/shakespeare_char/prepare.py.
    assert "".join(documents.train()) == data[: int(n * 0.9)]
    assert "".join(documents.validation()) == data[int(n * 0.9) :]


def test_stream_has_eos_before_and_after_documents():
    corpus = prepare_corpus(SOURCE, ByteTokenizerConfig(), BY_DOCUMENT, None)
    tokens = corpus.train
    train = list(SplitDocuments(SOURCE, BY_DOCUMENT).train())
    assert tokens.stream.dtype == np.uint16
    assert bytes(max(t - 3, 0) for t in tokens.stream.tolist()) == b"\0" + b"".join(
        text.encode() + b"\0" for text in train
    )
    assert tokens.num_bytes == sum(len(text.encode()) for text in train)
    decoded = [ByteTokenizer().decode(tokens.stream[a:b]) for a, b in zip(tokens.starts, tokens.ends, strict=True)]
    assert decoded == train
    assert (tokens.stream[tokens.ends - 1] == 1).all()


def test_stream_without_eos_is_the_bare_text():
    corpus = prepare_corpus(SOURCE, CharacterTokenizerConfig(), BY_POSITION, None)
    text = "".join(SOURCE.texts)
    for tokens, part in (
        (corpus.train, text[: int(len(text) * 0.9)]),
        (corpus.validation, text[int(len(text) * 0.9) :]),
    ):
        assert corpus.tokenizer.decode(tokens.stream) == part
    # The first token of a document is no target: nothing stands before it.
    assert corpus.train.starts[0] == 1


def test_stream_with_a_bos_of_its_own():
    class BosBytes(ByteTokenizer):
        bos_id = 2

    class Config(TokenizerConfig):
        def build_plain(self, documents):
            return BosBytes()

    corpus = prepare_corpus(Texts(("ab", "c")), Config(), Split("position", 0.01), None)
    assert corpus.train.stream.tolist() == [2, 100, 101, 1]
    assert (corpus.train.starts.tolist(), corpus.train.ends.tolist()) == ([1], [4])


def test_long_documents_are_encoded_in_pieces():
    text = "".join(f"line {i} of a long document\n" for i in range(3000))
    corpus = prepare_corpus(Texts((text, "short")), ByteTokenizerConfig(), Split("position", 0.5), None)
    assert corpus.tokenizer.decode(corpus.train.stream) == text[: (len(text) + 5) // 2]
    assert len(corpus.train.starts) == 1
    assert len(corpus.validation.starts) == 2


@pytest.mark.parametrize(
    "config",
    [
        ByteTokenizerConfig(),
        CharacterTokenizerConfig(),
        WordTokenizerConfig(vocab_size=20),
        SentencePieceConfig(vocab_size=300),
        ByteTokenizerConfig(special_tokens=SpecialTokens(names=("[MASK]",), num_sentinels=3)),
    ],
)
def test_second_start_reads_what_the_first_wrote(tmp_path, config, monkeypatch):
    source = TextSource(files=f"{tmp_path}/*.txt")
    for number, text in enumerate(SOURCE.texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    first = prepare_corpus(source, config, BY_DOCUMENT, tmp_path / "data")

    monkeypatch.setattr(TextSource, "documents", None)
    second = prepare_corpus(source, config, BY_DOCUMENT, tmp_path / "data")
    for name in ("train", "validation"):
        a, b = getattr(first, name), getattr(second, name)
        assert np.array_equal(a.stream, b.stream)
        assert np.array_equal(a.starts, b.starts)
        assert a.num_bytes == b.num_bytes
    assert first.fingerprint == second.fingerprint
    loaded = load_tokenizer(tmp_path / "data", first.tokenizer.fingerprint())
    assert (loaded.vocab_size, loaded.special_ids) == (first.tokenizer.vocab_size, first.tokenizer.special_ids)
    assert isinstance(second.train.stream, np.memmap)


def test_fingerprint_follows_the_content_not_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("one two three " * 50)
    source = TextSource(files=f"{tmp_path}/*.txt")
    first = prepare_corpus(source, ByteTokenizerConfig(), BY_POSITION, tmp_path / "data")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    moved = prepare_corpus(source, ByteTokenizerConfig(), BY_POSITION, tmp_path / "data")
    assert moved.fingerprint == first.fingerprint
    (tmp_path / "b.txt").write_text("one two thref " * 50)
    changed = prepare_corpus(source, ByteTokenizerConfig(), BY_POSITION, tmp_path / "data")
    assert changed.fingerprint != first.fingerprint
    # The first preparation is still there, whatever the file became.
    assert len(list((tmp_path / "data").glob("*/prepared.json"))) == 3


def test_failures_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="larger than the corpus allows"):
        prepare_corpus(SOURCE, WordTokenizerConfig(vocab_size=10_000), BY_DOCUMENT, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(UserError, match="does not hold the tokenizer"):
        load_tokenizer(tmp_path / "data", "no such fingerprint")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot keep the tokens .*file"):
        prepare_corpus(SOURCE, ByteTokenizerConfig(), BY_DOCUMENT, tmp_path / "file")


def test_truncated_tokens_are_noticed(tmp_path):
    prepare_corpus(SOURCE, ByteTokenizerConfig(), BY_DOCUMENT, tmp_path)
    [file] = tmp_path.glob("*/train.bin")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.bin is damaged: remove"):
        prepare_corpus(SOURCE, ByteTokenizerConfig(), BY_DOCUMENT, tmp_path)


def test_of_several_corpora_the_tokenizer_asked_for_is_loaded(tmp_path):
    bytes_corpus = prepare_corpus(SOURCE, ByteTokenizerConfig(), BY_DOCUMENT, tmp_path)
    characters = prepare_corpus(SOURCE, CharacterTokenizerConfig(), BY_DOCUMENT, tmp_path)
    for corpus in (bytes_corpus, characters):
        wanted = corpus.tokenizer.fingerprint()
        assert load_tokenizer(tmp_path, wanted).fingerprint() == wanted


def test_a_slower_process_takes_the_result_of_the_faster(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Overtaken(Texts):
        """While it is being read, another process prepares the same corpus."""

        def documents(self):
            if not list(tmp_path.glob("*/prepared.json")):
                prepare_corpus(Plain(SOURCE.texts), ByteTokenizerConfig(), BY_DOCUMENT, tmp_path)
            return iter(self.texts)

    class Plain(Texts):
        pass

    corpus = prepare_corpus(Overtaken(SOURCE.texts), ByteTokenizerConfig(), BY_DOCUMENT, tmp_path)
    assert corpus.fingerprint == prepare_corpus(SOURCE, ByteTokenizerConfig(), BY_DOCUMENT, None).fingerprint
    assert [path.name for path in tmp_path.iterdir()] == [next(tmp_path.glob("*/prepared.json")).parent.name]
    assert json.loads(next(tmp_path.glob("*/prepared.json")).read_text())["dtype"] == "<u2"


def test_models_with_many_ids_use_wider_tokens():
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode(self, text):
            return super().encode(text) + 65_536

    class Config(TokenizerConfig):
        def build_plain(self, documents):
            return Wide()

    corpus = prepare_corpus(SOURCE, Config(), BY_DOCUMENT, None)
    assert corpus.train.stream.dtype == np.uint32
    assert corpus.train.stream[1] == 65_536 + 3 + ord("D")


def test_document_bounds_are_part_of_the_fingerprint():
    split = Split("position", 0.2)
    prints = [
        prepare_corpus(Texts(texts), CharacterTokenizerConfig(), split, None).fingerprint
        for texts in (("ab", "cde"), ("abc", "de"))
    ]
    assert prints[0] != prints[1]
