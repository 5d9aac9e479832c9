"""A corpus that is wherever Python is: the documentation and the sources of its standard library."""

import ast
import functools
import importlib.util
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from t5x_like.configurable import configurable
from t5x_like.data.sources import DocumentSource
from t5x_like.errors import UserError

Part = Literal["docs", "docstrings", "sources"]

# Tests, tables, and what is not the library itself. Directories that are no identifiers (site-packages) never count.
_SKIPPED = {"__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}


@configurable
class PythonLibrarySource(DocumentSource):
    """English prose and code that need no download: the standard library of the running Python.

    With Python 3.11: 0.5 MB of docs, 1.9 MB of docstrings, 8.2 MB of sources. Another version of Python gives other
    documents.

    Attributes:
      parts: `docs`: the chapters of the language reference that `help()` shows, one document each; `docstrings`: the
        docstrings of a module under the names they document, one document per module; `sources`: the modules
        themselves (these hold the docstrings once more).
    """

    parts: tuple[Part, ...] = ("docs", "docstrings")

    def __post_init__(self):
        unknown = set(self.parts) - set(get_args(Part))
        if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
            raise UserError(f"PythonLibrarySource.parts={self.parts!r}: choose from {get_args(Part)}, each once.")

    def cache_key(self) -> str:
        return repr((self, sys.version))

    def documents(self) -> Iterator[str]:
        """Yields the documents part by part; UserError when this Python came without its library's text."""
        for part in self.parts:
            documents = _read(part)
            if not documents:
                raise UserError(
                    f"This Python has no {part} of its standard library in {sysconfig.get_path('stdlib')}: "
                    "install it in full, or train on your own files with TextSource."
                )
            yield from documents


@functools.cache
def _read(part: Part) -> tuple[str, ...]:
    # Kept: docstrings take seconds to extract, and a run reads its corpus several times.
    if part == "docs":
        return _reference_chapters()
    modules = _module_sources(Path(sysconfig.get_path("stdlib")))
    if part == "sources":
        return tuple(source for _, source in modules if source)
    return tuple(document for name, source in modules if (document := _docstrings(name, source)))


def _reference_chapters() -> tuple[str, ...]:
    if importlib.util.find_spec("pydoc_data") is None:
        return ()
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))


def _module_sources(library: Path) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, source) of the library's modules, sorted by path."""
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(name for name in folders if name.isidentifier() and name not in _SKIPPED)
        for file in sorted(files):
            # _sysconfigdata describes the machine on which this Python was built.
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                name = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
                yield name, path.read_text(encoding="utf-8", errors="replace")


def _docstrings(module: str, source: str) -> str:
    """The docstrings of a module, each under the heading of what it documents, as `help()` would print them."""
    if '"""' not in source and "'''" not in source:
        return ""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except SyntaxError:
        return ""  # A template, not a module.
    return "\n\n".join(_entries(tree, module, f"Module {module}"))


def _entries(node: ast.AST, name: str, heading: str) -> Iterator[str]:
    if docstring := ast.get_docstring(node, clean=False):
        yield f"{heading}\n\n{inspect.cleandoc(docstring)}"
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _entries(child, f"{name}.{child.name}", f"class {name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _entries(child, f"{name}.{child.name}", f"{name}.{child.name}({ast.unparse(child.args)})")
