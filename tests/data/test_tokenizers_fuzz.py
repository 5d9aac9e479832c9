"""Tokenizer files of a stranger: a tokenizer, or one clear error; and never a crash of the interpreter."""

import io
import json
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from t5x_like.data.subwords import MODEL_FILE
from t5x_like.data.tokenizers import VOCABULARY_FILE, read_tokenizer
from t5x_like.errors import UserError

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
VOCABULARY = st.fixed_dictionaries(
    {"type": st.sampled_from(["byte", "character", "word", "sentencepiece", "pickle"]) | ANYTHING},
    optional={"characters": ANYTHING, "words": ANYTHING | st.lists(st.text(max_size=3), max_size=4)},
)


@given(st.binary(max_size=100) | (VOCABULARY | ANYTHING).map(lambda value: json.dumps(value).encode()))
@example(b"[" * 10**5)
@example(b'{"type": "character", "characters": ""}')
@example(b'{"type": "character", "characters": "\\ud800"}')
@example(b'{"type": "sentencepiece"}')
def test_any_vocabulary_is_read_or_refused(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / VOCABULARY_FILE).write_bytes(content)
    try:
        tokenizer = read_tokenizer(directory)
    except UserError as refused:
        shown = str(refused)
    else:
        shown = f"{directory}{tokenizer.decode(range(-2, 10))}"
    assert str(directory) in shown


DAMAGED_MODELS = """
import random, sys
from pathlib import Path
from t5x_like.data.subwords import SentencePieceTokenizer
from t5x_like.data.tokenizers import read_tokenizer
from t5x_like.errors import UserError
directory, rng = Path(sys.argv[1]), random.Random(0)
good = (directory / "good").read_bytes()
read = refused = 0
for number in range(400):
    content = bytearray(good)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(content))
        match number % 4:
            case 0: content[place] = rng.randrange(256)
            case 1: del content[place:]; content += b" "
            case 2: content[place:place] = content[place : place + rng.randrange(50)]
            case 3: content = bytearray(rng.randbytes(rng.randrange(1, 200)))
    (directory / "spiece.model").write_bytes(content)
    try:
        read_tokenizer(directory).encode("the cat sat")
        read += 1
    except UserError:
        refused += 1
    except UnicodeDecodeError:
        pass  # A piece that is no text: found when it is used.
print(read, refused)
"""


def test_damaged_sentencepiece_models_are_read_or_refused(tmp_path):
    """In a process of its own, which a fault in the library's C++ would kill."""
    model = io.BytesIO()
    texts = ["the cat sat on the mat and then it ran away from the dog"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2
    )
    (tmp_path / "good").write_bytes(model.getvalue())
    (tmp_path / VOCABULARY_FILE).write_text('{"type": "sentencepiece"}')
    process = subprocess.run(
        [sys.executable, "-c", DAMAGED_MODELS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr[-2000:]
    read, refused = map(int, process.stdout.split())
    assert read
    assert refused > 100


@pytest.mark.parametrize("name", [VOCABULARY_FILE, MODEL_FILE])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / VOCABULARY_FILE).write_text('{"type": "sentencepiece"}')
    (tmp_path / MODEL_FILE).touch()
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"The tokenizer in {tmp_path} is damaged"):
        read_tokenizer(tmp_path)
