import hashlib
import json

import numpy as np
import pytest
from rich.console import Console

from t5x_like.data.build import DataConfig, build_data
from t5x_like.data.corpus import load_tokenizer
from t5x_like.data.prepare.config import PrepareConfig
from t5x_like.data.prepare.engine import LocalEngine
from t5x_like.data.prepare.run import prepare
from t5x_like.data.prepared import PreparedSource, PreparedTokenizerConfig
from t5x_like.data.sources import TextSource
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.errors import UserError


def texts(number):
    rng = np.random.default_rng(number)
    words = [f"w{i}" for i in range(300)]
    return [" ".join(rng.choice(words, int(rng.integers(5, 60)))) + ".\n" for _ in range(100)]


def make(folder, number, tokenizer=None):
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(number)))
    config = PrepareConfig(
        files=str(folder / "in.jsonl"),
        directory=str(folder / "out"),
        shard_bytes=3000,
        tokenizer=tokenizer or SentencePieceConfig(vocab_size=300),
    )
    with open(folder / "log", "w") as log:
        prepare(config, LocalEngine(1, console=Console(file=log)))
    return str(folder / "out")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make(tmp_path_factory.mktemp("prepared"), 0)


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
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text[:-1]}) + "\n" for text in texts(0)))
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
