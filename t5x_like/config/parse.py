"""Reads gin files and command-line bindings into `Binding`s that know where they stand.

The grammar is gin's: its parser reads the text, and nothing else of gin is used (no global state, no wrapped
constructors). Added are arithmetic (`%STEPS // 10`), `true`, `false`, `inf`, and unquoted strings on the command line.
Taken away is everything that runs code: a config file imports nothing.
"""

import dataclasses
import tokenize
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gin import config_parser

import t5x_like
from t5x_like.config.bindings import Binding, Bindings, ConfigError, Macro, Operation, Reference, did_you_mean


def _shipped() -> Path:
    package = Path(str(resources.files(t5x_like)))
    inside = package / "gin_configs"
    return inside if inside.is_dir() else package.parent / "gin_configs"


SHIPPED = _shipped()
"""The directory of the shipped gin files: in an installed package within it, in the repository beside it."""

COMMAND_LINE = "command line"


def read_bindings(files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str] = ()) -> Bindings:
    """Reads `files` with all that they include, then the command line's `NAME=VALUE` overrides, in order.

    A file is looked for in the working directory, then in `search_paths`, then among the shipped files; an included
    file first beside the file that includes it.
    """
    libraries = [*map(Path, search_paths), SHIPPED]
    bindings: list[Binding] = []
    for name in files:
        bindings += _read_file(_find(name, [Path()], libraries, "--gin_file"), libraries, ())
    bindings = [dataclasses.replace(binding, order=order) for order, binding in enumerate(bindings)]
    return Bindings(bindings + [_read_override(text, order=len(bindings)) for text in overrides])


def _find(name: str, first: list[Path], libraries: list[Path], asked_by: str) -> Path:
    for directory in [*first, *libraries, Path()]:
        if (directory / name).is_file():
            return directory / name
    known = [str(path.relative_to(library)) for library in libraries for path in library.rglob("*.gin")]
    same_name = [path for path in known if Path(path).name == Path(name).name]
    hint = f"; did you mean {' or '.join(same_name)}?" if same_name else did_you_mean(name, known)
    looked = ", ".join(dict.fromkeys(str(directory) for directory in [*first, *libraries, Path()]))
    raise ConfigError(f"{asked_by}: there is no gin file {name} (looked in {looked}){hint}")


def _read_file(path: Path, libraries: list[Path], including: tuple[Path, ...]) -> list[Binding]:
    path = path.resolve()
    if path in including:
        raise ConfigError(f"gin files include each other: {' -> '.join(map(_shown, [*including, path]))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_shown(path)} cannot be read: {error}") from error
    bindings = []
    for statement in _statements(text, _shown(path)):
        origin = f"{_shown(path)}:{statement.location.line_num}"
        match statement:
            case config_parser.ImportStatement():
                raise ConfigError(
                    f"{origin}: a config file runs no code, so it cannot import {statement.module}; "
                    "for classes of your own pass --plugin=package.module"
                )
            case config_parser.IncludeStatement():
                included = _find(statement.filename, [path.parent], libraries, origin)
                bindings += _read_file(included, libraries, (*including, path))
            case config_parser.BindingStatement():
                bindings.append(Binding(_name(statement), statement.value, origin))
    return bindings


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _name(statement: config_parser.BindingStatement) -> str:
    selector = f"{statement.selector}.{statement.arg_name}" if statement.arg_name else statement.selector
    return f"{statement.scope}/{selector}" if statement.scope else selector


def _read_override(text: str, order: int) -> Binding:
    """Reads one `NAME=VALUE`; a value that is no gin value is a string, so that paths need no quotes."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"{COMMAND_LINE}: {text} is not of the form NAME=VALUE")
    try:
        statement = _single_binding(f"{name} = {value}")
    except ConfigError:
        if value.startswith(tuple("@%[({'\"")):
            raise
        statement = _single_binding(f"{name} = {value!r}")
    return Binding(_name(statement), statement.value, COMMAND_LINE, order, value)


def _single_binding(text: str) -> config_parser.BindingStatement:
    statements = list(_statements(text, COMMAND_LINE))
    if len(statements) != 1 or not isinstance(statements[0], config_parser.BindingStatement):
        raise ConfigError(f"{COMMAND_LINE}: {text} is not one binding NAME=VALUE")
    return statements[0]


def _statements(text: str, shown: str) -> Iterator[Any]:
    try:
        yield from _Parser(text, _Delegate())
    except SyntaxError as error:
        line, caret = "".join(text.split("\n")[error.lineno - 1 : error.lineno]), " " * (error.offset or 0) + "^"
        where = shown if shown == COMMAND_LINE else f"{shown}:{error.lineno}"
        raise ConfigError(f"{where}: {error.msg}\n    {line}\n    {caret}") from None
    except tokenize.TokenError:
        # Its words differ between versions of Python.
        raise ConfigError(f"{shown}: the file ends inside a value: is a bracket or a quote left open?") from None
    except RecursionError:
        raise ConfigError(f"{shown}: a value is nested too deeply") from None


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, cls = scoped_configurable_name.rpartition("/")
        return Reference(scope, cls, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


_CONSTANTS = {"true": True, "false": False, "inf": float("inf")}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "**": 3}


class _Parser(config_parser.ConfigParser):
    """gin's parser, with arithmetic."""

    def parse_value(self, level: int = 1) -> Any:
        value = self._parse_operand()
        while _PRECEDENCE.get(operator := self._current_token.string, 0) >= level:
            self._advance()
            # `**` groups to the right, the others to the left.
            right = self.parse_value(_PRECEDENCE[operator] + (operator != "**"))
            value = Operation(operator, value, right)
        return value

    def _parse_operand(self) -> Any:
        token = self._current_token
        if token.string == "-":
            self._advance()
            value = self.parse_value(_PRECEDENCE["**"])
            return -value if type(value) in (int, float) else Operation("-", 0, value)
        if token.string in _CONSTANTS:
            self._advance()
            return _CONSTANTS[token.string]
        if token.type == tokenize.NAME and token.string not in ("True", "False", "None"):
            self._raise_syntax_error(f"{token.string} is no value: put strings in quotes, % before a macro")
        return super().parse_value()

    def _maybe_parse_macro(self) -> tuple[bool, Any]:
        # gin reads `%A / 2` as a macro in a scope; macros have no scopes here, and `/` divides.
        if self._current_token.string != "%":
            return False, None
        self._advance()
        name = self._parse_identifier()
        if name == "gin" and self._current_token.string == ".":
            self._advance()
            name = f"gin.{self._parse_identifier()}"
        return True, self._delegate.macro(name)
