import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.objectives.causal import PrefixLM
from t5x_like.data.objectives.corruption import SpanCorruption
from t5x_like.data.objectives.masked import MaskedLM
from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.data.sources import TextSource
from t5x_like.data.tokenizers import ByteTokenizerConfig, CharacterTokenizerConfig, SpecialTokens
from t5x_like.errors import UserError


def write(tmp_path, text, name="text.txt"):
    (tmp_path / name).write_text(text)
    return TextSource(files=f"{tmp_path}/*.txt")


def config(source, **fields):
    defaults = {"sequence_length": 16, "batch_size": 4, "tokenizer": ByteTokenizerConfig(), "split": "position"}
    return DataConfig(source=source, **(defaults | fields))


def test_nanogpt_recipe(tmp_path):
    text = "".join(f"Line {i}, of {i * i} words.\n" for i in range(500))
    data = build_data(
        config(
            write(tmp_path, text),
            tokenizer=CharacterTokenizerConfig(),
            layout="random_windows",
            validation_fraction=0.1,
        ),
        tmp_path / "data",
    )
    assert data.tokenizer.vocab_size == len(set(text))
    batch = data.train.batch(7)
    for inputs, targets in zip(batch["decoder_input_tokens"], batch["decoder_target_tokens"], strict=True):
        window = data.tokenizer.decode([*inputs, targets[-1]])
        assert window in text[: int(len(text) * 0.9)]
        assert data.tokenizer.decode(targets) == window[1:]
    rows = [data.validation.batch(i) for i in range(data.validation.num_batches)]
    ids = np.concatenate([row["decoder_target_tokens"][row["decoder_loss_weights"] == 1] for row in rows])
    assert data.tokenizer.decode(ids) == text[int(len(text) * 0.9) + 1 :]


@pytest.mark.parametrize("layout", ["concatenate", "pack", "random_windows"])
def test_validation_figures(tmp_path, layout):
    source = write(tmp_path, "é" * 300)
    data = build_data(config(source, layout=layout, validation_fraction=0.5), None)
    # 150 characters of two bytes and the end of the document.
    assert data.validation.layout.num_tokens == 301
    assert data.validation.num_batches == math.ceil(301 / 16 / 4)
    assert data.bytes_per_token == 300 / 301
    assert "300 bytes, 301 tokens" in data.describe()
    assert ("decoder_segment_ids" in data.train.batch(0)) == (layout == "pack")


def test_fingerprint_is_of_all_that_decides_batches(tmp_path):
    source = write(tmp_path, "some text " * 100)
    changes = [{}, {"layout": "pack"}, {"sequence_length": 8}, {"batch_size": 2}, {"seed": 1}]
    changes += [{"validation_fraction": 0.5}, {"tokenizer": CharacterTokenizerConfig()}]
    changes += [{"objective": PrefixLM()}, {"objective": PrefixLM(mean_suffix_rate=0.25)}]
    prints = [build_data(config(source, **change), None).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    assert build_data(config(source), tmp_path / "data").fingerprint == prints[0]


def test_too_little_text(tmp_path):
    with pytest.raises(UserError, match=r"has 16 tokens, less than .*sequence_length=17: use shorter"):
        build_data(config(write(tmp_path, "x" * 30), sequence_length=17, validation_fraction=0.5), None)
    with pytest.raises(UserError, match=r"No text is left for validation.* none of 1 documents.*'position'"):
        build_data(config(write(tmp_path, "x" * 30), split="document", validation_fraction=1e-9), None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence_length", 0),
        ("batch_size", -1),
        ("seed", -1),
        ("validation_fraction", 1.0),
        ("validation_fraction", 0),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(UserError, match=f"DataConfig.{field}={value}"):
        config(PythonLibrarySource(), **{field: value})


def test_objectives_and_layouts_that_do_not_fit(tmp_path):
    source, special = (
        write(tmp_path, "Some text. More text.\n" * 100),
        SpecialTokens(names=("[MASK]", "[CLS]", "[SEP]")),
    )
    with pytest.raises(UserError, match=r"DataConfig.layout='pack' mixes documents.*set it to 'documents'"):
        config(source, objective=MaskedLM(pairs="order"), layout="pack")
    with pytest.raises(UserError, match=r"sequence_length=2 has no room for text .* MaskedLM: it must be at least 3"):
        config(source, objective=MaskedLM(), sequence_length=2)
    pairs = config(
        source,
        objective=MaskedLM(pairs="next"),
        layout="documents",
        tokenizer=ByteTokenizerConfig(special_tokens=special),
        validation_fraction=0.5,
    )
    with pytest.raises(UserError, match=r"other documents, but training has only one: .*document_separator"):
        build_data(pairs, None)


def test_description_of_a_step(tmp_path):
    tokenizer = ByteTokenizerConfig(special_tokens=SpecialTokens(num_sentinels=10))
    source = write(tmp_path, "x" * 9999)
    data = build_data(config(source, objective=SpanCorruption(), tokenizer=tokenizer, sequence_length=64), None)
    assert data.config.features["decoder_input_tokens"] == ((14,), "int32")
    assert data.describe().splitlines()[1] == (
        "4 x 64 encoder + 4 x 14 decoder = 312 tokens per step: 279 of text, about 56 predicted "
        "(SpanCorruption, concatenate)"
    )


TRACE = """
import hashlib
import pathlib
import sys
from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.objectives.causal import CausalLM
from t5x_like.data.objectives.corruption import UL2
from t5x_like.data.objectives.masked import MaskedLM
from t5x_like.data.objectives.permutation import PermutationLM
from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import SpecialTokens
special = SpecialTokens(names=("[MASK]", "[CLS]", "[SEP]", "[R]", "[S]", "[X]"), num_sentinels=30)
tokenizer = SentencePieceConfig(vocab_size=600, special_tokens=special)
digest = hashlib.sha256()
for objective in (CausalLM(), UL2(), MaskedLM(), PermutationLM()):
    config = DataConfig(sequence_length=64, batch_size=8, source=PythonLibrarySource(parts=("docs",)), layout="pack",
                        tokenizer=tokenizer, objective=objective)
    data = build_data(config, pathlib.Path(sys.argv[1]))
    digest.update(data.fingerprint.encode())
    for step in (0, 3, 10**6):
        for name, values in sorted(data.train.batch(step).items()):
            digest.update(values.tobytes())
print(digest.hexdigest())
"""


def test_batches_are_the_same_in_every_process(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TRACE, str(tmp_path / seed)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    traces = {run.communicate()[0] for run in runs}
    assert len(traces) == 1
    assert len(traces.pop().strip()) == hashlib.sha256().digest_size * 2
