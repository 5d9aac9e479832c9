import hashlib
import json

import pytest

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.corpus import load_tokenizer
from t5x_like.data.prepared import PreparedSource, PreparedTokenizerConfig
from t5x_like.data.sources import TextSource
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.errors import UserError
from tests.data.corpora import make_corpus, random_texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("prepared"), 0)


def config(directory, **fields):
    source = PreparedSource(directory=directory)
    defaults = {"source": source, "tokenizer": None, "validation_fraction": 0.2}
    return DataConfig(**(defaults | {"sequence_length": 32, "batch_size": 4} | fields))


def trace(batches, steps):
    digest = hashlib.sha256()
    for step in steps:
        for name, values in sorted(batches.batch(step).items()):
            digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("layout", ["concatenate", "pack", "random_windows"])
def test_batches_are_those_of_the_text_itself(corpus, tmp_path, layout):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text[:-1]}) + "\n" for text in random_texts(0)))
    ours = build_data(config(corpus, layout=layout), None)
    source = TextSource(files=f"{tmp_path}/in.jsonl")
    same = build_data(
        config(corpus, layout=layout, source=source, tokenizer=PreparedTokenizerConfig(directory=corpus)), None
    )
    assert trace(ours.train, range(50)) == trace(same.train, range(50))
    numbers = range(ours.validation.num_batches)
    assert trace(ours.validation, numbers) == trace(same.validation, numbers)
    assert ours.describe() == same.describe()


def test_the_tokenizer_goes_with_the_run(corpus, tmp_path):
    data = build_data(config(corpus), tmp_path)
    assert load_tokenizer(tmp_path, data.tokenizer.fingerprint()).vocab_size == data.tokenizer.vocab_size
    assert build_data(config(corpus), tmp_path).fingerprint == data.fingerprint
    assert build_data(config(corpus, validation_fraction=0.3), None).fingerprint != data.fingerprint


def test_a_source_and_a_tokenizer_that_do_not_go_together(corpus):
    with pytest.raises(UserError, match=r"@PreparedSource\(\) has its own tokenizer: set DataConfig.tokenizer = None"):
        config(corpus, tokenizer=SentencePieceConfig())
    with pytest.raises(UserError, match=r"tokenizer=None: choose one for the text of @TextSource\(\)"):
        config(corpus, source=TextSource(files="x"))
