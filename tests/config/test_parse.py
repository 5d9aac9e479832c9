import re

import pytest

from t5x_like.config import ConfigError, parse_config
from t5x_like.config.parse import SHIPPED


def write(directory, **files):
    for name, text in files.items():
        path = directory / f"{name.replace('__', '/')}.gin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def values(config):
    return {binding.name: binding.value for binding in config.bindings.in_force()}


def test_an_included_file_is_found_beside_the_including_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a__run="include 'part.gin'\ninclude '../b/part.gin'\nX = 1", a__part="Y = 2", b__part="Z = 3")
    write(tmp_path, part="Y = 'the wrong one'")
    assert values(parse_config(["a/run.gin"])) == {"Y": 2, "Z": 3, "X": 1}


def test_then_in_the_search_paths_then_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a__run="include 'one.gin'\ninclude 'two.gin'", lib__one="X = 1", one="X = 2", two="Y = 3")
    assert values(parse_config(["a/run.gin"], [], ["lib"])) == {"X": 1, "Y": 3}
    assert values(parse_config(["run.gin"], [], ["a", "lib"])) == {"X": 1, "Y": 3}


def test_shipped_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, shipped__runs__tiny="X = 1")
    monkeypatch.setattr("t5x_like.config.parse.SHIPPED", tmp_path / "shipped")
    assert values(parse_config(["runs/tiny.gin"])) == {"X": 1}
    assert SHIPPED.is_dir()


def test_bindings_know_where_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path, run="# A comment.\n\nX = [\n  1,\n  2,\n]\na/Cls.field = 'a' 'b'\nCls:\n  one = 1\n  two = @b/C()\n"
    )
    bindings = parse_config(["run.gin"], ["Y=2"]).bindings.in_force()
    assert [(binding.name, binding.origin) for binding in bindings] == [
        ("X", "run.gin:3"),
        ("a/Cls.field", "run.gin:7"),
        ("Cls.one", "run.gin:9"),
        ("Cls.two", "run.gin:10"),
        ("Y", "command line"),
    ]
    assert [binding.value for binding in bindings[:2]] == [[1, 2], "ab"]


ERRORS = {
    "import": (
        "import os",
        "run.gin:1: a config file runs no code, so it cannot import os; "
        "for classes of your own pass --plugin=package.module",
    ),
    "dynamic registration": (
        "X = 1\nfrom __gin__ import dynamic_registration",
        "run.gin:2: a config file runs no code, so it cannot import __gin__.dynamic_registration; "
        "for classes of your own pass --plugin=package.module",
    ),
    "no quotes": (
        "X = abc",
        "run.gin:1: abc is no value: put strings in quotes, % before a macro\n    X = abc\n        ^",
    ),
    "two values": ("X = 1e-3.0", "run.gin:1: Expected newline.\n    X = 1e-3.0\n            ^"),
    "half a sum": ("Y = 1\nX = 2 *", "run.gin:2: Unable to parse value.\n    X = 2 *\n           ^"),
    "empty block": ("Cls:", "run.gin:2: Expected indentation.  Got ENDMARKER = .\n    \n    ^"),
    "open bracket": ("X = (1,", "run.gin: the file ends inside a value: is a bracket or a quote left open?"),
    "circle": ("include 'other.gin'", "gin files include each other: run.gin -> other.gin -> run.gin"),
    "missing include": (
        "X = 1\ninclude 'othr.gin'",
        "run.gin:2: there is no gin file othr.gin (looked in {cwd}, lib, {shipped}, .); did you mean other.gin?",
    ),
}


@pytest.mark.parametrize("row", ERRORS)
def test_message_about_a_file(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    text, message = ERRORS[row]
    write(tmp_path, run=text, other="include 'run.gin'", lib__other="X = 1")
    with pytest.raises(ConfigError) as caught:
        parse_config(["run.gin"], [], ["lib"])
    assert str(caught.value) == message.format(cwd=tmp_path, shipped=SHIPPED)


def test_a_missing_file_names_its_namesakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, lib__runs__small="X = 1")
    message = r"--gin_file: there is no gin file small.gin \(looked in .*\); did you mean runs/small.gin\?"
    with pytest.raises(ConfigError, match=message):
        parse_config(["small.gin"], [], ["lib"])


@pytest.mark.parametrize("text", ["X", "include 'a.gin'", "a b=1", "=3", "X=@Foo(1)", "X=[1, 2"])
def test_message_about_the_command_line(text):
    with pytest.raises(ConfigError, match=r"^command line: "):
        parse_config([], [text])


@pytest.mark.parametrize(
    ("typed", "value"),
    [("3", 3), ("3x", "3x"), ("runs/a", "runs/a"), ("a'b", "a'b"), ("3\nY=4", "3\nY=4"), ("~/x", "~/x")],
)
def test_what_is_no_value_on_the_command_line_is_a_string(typed, value):
    assert values(parse_config([], [f"X={typed}"])) == {"X": value}


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "run.gin").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=re.escape("run.gin cannot be read: 'utf-8' codec")):
        parse_config([str(tmp_path / "run.gin")])
