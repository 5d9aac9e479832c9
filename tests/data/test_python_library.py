import inspect
import json
import sysconfig
from pathlib import Path

import pytest

from t5x_like.data import python_library
from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.errors import UserError


def test_docs_and_docstrings_are_what_python_shows():
    documents = list(PythonLibrarySource().documents())
    assert documents == list(PythonLibrarySource().documents())
    assert any(text.startswith('The "if" statement\n') for text in documents)
    [text] = [text for text in documents if text.startswith("Module json\n")]
    assert inspect.getdoc(json) in text
    assert "json.loads(s, *, cls=None, object_hook=None" in text
    assert inspect.getdoc(json.loads) in text
    assert sum(map(len, documents)) > 1_500_000
    assert not any(text.startswith(("Module test.", "Module idlelib", "Module pip.")) for text in documents)


def test_sources_are_the_files_of_the_library():
    documents = set(PythonLibrarySource(parts=("sources",)).documents())
    library = Path(sysconfig.get_path("stdlib"))
    assert (library / "json" / "decoder.py").read_text(encoding="utf-8") in documents
    assert (library / "_sysconfigdata.py").name not in documents
    assert not any("build_time_vars = {" in text for text in documents)


def test_docstrings_of_nested_definitions_stand_under_their_names():
    source = '''
class Outer:
    """Outer's.

        Indented.
    Not indented.
    """
    async def method(self, x: int = 3, *rest):
        "One line."
def undocumented(): pass
TEXT = """not a docstring"""
'''
    outer = "class m.Outer\n\nOuter's.\n\n    Indented.\nNot indented."
    expected = f"{outer}\n\nm.Outer.method(self, x: int=3, *rest)\n\nOne line."
    assert python_library._docstrings("m", source) == expected
    assert python_library._docstrings("m", '"""Template {{ not Python') == ""


def test_a_python_without_its_library_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    python_library._read.cache_clear()
    with pytest.raises(UserError, match="TextSource"):
        list(PythonLibrarySource(parts=("sources",)).documents())
    python_library._read.cache_clear()


@pytest.mark.parametrize("parts", [(), ("docs", "docs"), ("books",)])
def test_bad_parts(parts):
    with pytest.raises(UserError, match="parts"):
        PythonLibrarySource(parts=parts)
