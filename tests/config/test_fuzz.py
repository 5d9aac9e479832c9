"""Gin files of a stranger: an error that names the place, or a configuration; never a crash, a hang or an execution."""

import contextlib
import random
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5x_like.config import parse_config
from t5x_like.config.parse import SHIPPED
from t5x_like.errors import UserError
from t5x_like.training.experiment import Experiment

WORDS = "include import from 'x' \"y\" 1 2.5 1e999 True None inf Experiment.model RunConfig.steps @RunConfig() %A 0x"
TOKENS = st.sampled_from([*"AB=+-*/()[]{},:.@%\n#\\", "//", "**", "%gin.REQUIRED", "'''", *WORDS.split()])


def read(path: Path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        parse_config([str(path)]).build(Experiment)


@given(st.text(max_size=200) | st.binary(max_size=200) | st.lists(TOKENS, max_size=30).map(" ".join))
@example("A = " + "[" * 5000)
@example("A = " + "(" * 500 + ")" * 500)
@example("A = " + "-" * 5000 + "1")
@example("A = 9**99**99**99")
@example("A = (9**99)")
@example("A = 9**99\nB = %A**99\nC = %B**99\nD = %C**99\nSTEPS = %D\nRunConfig.steps = %D")
@example("A = " + "9" * 10**5)
@example("A = %A")
@example("A = %B\nB = %A")
@example("\0")
@example("A = '\\ud800'")
@example("include 'fuzz.gin'")
@example("include '/dev/zero'")
@example("include '../../../../etc/passwd'")
@example("import os")
@example("from os import system")
@example("A = __import__('os').system('true')")
@example("A = @os.system()")
@example("os.system.command = 'true'")
@settings(max_examples=200)
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    read(tmp_path_factory.getbasetemp() / "fuzz.gin", text)


def test_shipped_files_with_random_changes_are_read_or_refused(tmp_path):
    rng = random.Random(0)
    files = [path.read_bytes() for path in sorted(SHIPPED.rglob("*.gin"))]
    for number in range(300):
        content = bytearray(rng.choice(files))
        for _ in range(rng.randrange(1, 4)):
            match rng.randrange(3):
                case 0:
                    content[rng.randrange(len(content))] = rng.randrange(256)
                case 1:
                    del content[rng.randrange(len(content)) :]
                    content += b" "
                case 2:
                    place = rng.randrange(len(content))
                    content[place:place] = content[place : place + rng.randrange(40)]
        read(tmp_path / f"{number}.gin", bytes(content))


@pytest.mark.parametrize("text", ["import this", "from this import s", "include 'this.py'", "A = @this.s"])
def test_no_module_is_imported(tmp_path, text):
    sys.modules.pop("this", None)
    read(tmp_path / "a.gin", text)
    assert "this" not in sys.modules
