"""Builds the objects of a run from its bindings, and refuses every binding that has no effect.

Scopes are gin's: `@scope/Class()` builds with the bindings `scope/Class.field`, for itself and for whatever it builds,
before the unscoped ones; a reference that names a scope replaces the scope around it. Beyond gin: a field whose default
is a configurable object is built like any other, so that bindings reach it.
"""

import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from t5x_like.config.bindings import (
    REQUIRED,
    Binding,
    Bindings,
    ConfigError,
    Macro,
    Operation,
    Reference,
    did_you_mean,
    unparse,
)
from t5x_like.config.check import default_of, fields_of, no_class, unknown_names, without_effect
from t5x_like.config.parse import read_bindings
from t5x_like.config.types import MismatchError, choices, coerce, configurables, describe, is_configurable
from t5x_like.configurable import REGISTRY

T = TypeVar("T")


class Setting(NamedTuple):
    """The value of a field, the binding that set it (None: the default), and an expression that gives it again."""

    value: Any
    binding: Binding | None
    expression: Any


@dataclasses.dataclass
class Node:
    """One object of the run: where it stands, and where each of its fields comes from."""

    cls: type
    scope: str
    path: str
    settings: dict[str, Setting]
    instance: Any


@dataclasses.dataclass(frozen=True)
class Config:
    """What files and command line say.

    Attributes:
      files: The gin files, as they were named.
      overrides: The bindings of the command line, as they were typed.
      bindings: All of them, read.
    """

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    bindings: Bindings

    def build(self, root: type[T]) -> T:
        """Builds `root` and all that it refers to.

        Raises:
          ConfigError: names all that is wrong: unknown names, missing values, wrong types, bindings without effect.
        """
        try:
            return self.resolve(root)[0].instance
        except RecursionError:
            raise ConfigError("the configuration is nested too deeply: macros refer to macros without end") from None

    def resolve(self, root: type) -> list[Node]:
        """As `build`, but returns the nodes of all objects, the root's first."""
        builder = _Builder(self.bindings)
        builder.build(root, "", root.__name__, {})
        nodes = list(builder.nodes.values())
        built = [(node.cls, node.scope) for node in nodes]
        unknown = [*unknown_names(self.bindings), *builder.unknown]
        problems = [*unknown, *builder.problems, *builder.missing_values()]
        if not unknown:
            # A misspelt name leaves whole objects out, whose bindings are no mistakes.
            problems += without_effect(self.bindings, builder.read, built)
        if len(problems) > 1:
            numbered = (f"{number}. {problem}" for number, problem in enumerate(problems, 1))
            raise ConfigError("\n".join([f"the configuration has {len(problems)} problems:", *numbered]))
        if problems:
            raise ConfigError(problems[0]) from builder.cause
        return nodes


def parse_config(files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()) -> Config:
    """Reads gin `files`, then the `NAME=VALUE` bindings of the command line; the later wins.

    Raises:
      ConfigError: if a file is missing or cannot be parsed.
    """
    return Config(tuple(files), tuple(bindings), read_bindings(files, bindings, search_paths))


_FAILED = object()
"""Stands for a value that a problem leaves open, so that one run reports all problems."""

_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
}


class _Builder:
    """Builds objects depth first, each once per class, scope and defaults, and notes the bindings that it reads.

    A binding may be replaced by a later one, and then what only the replaced one used is no mistake either: a run that
    swaps the optimizer of an included file may keep the old one's settings there. Settings made after the swap, or on
    the command line, are mistakes. So what was replaced is followed by a builder that constructs nothing, and whose
    `limit` is the order of what took its place: only earlier bindings count as read.
    """

    def __init__(self, bindings: Bindings, follows: "_Builder | None" = None, limit: float = math.inf) -> None:
        self.read: set[Binding] = follows.read if follows else set()
        self._followed: set[tuple[Any, str, float]] = follows._followed if follows else set()
        self._constructs, self._limit = follows is None, limit
        self.nodes: dict[tuple[str, str, str], Node] = {}
        self.problems: dict[str, None] = {}
        self.unknown: dict[str, None] = {}
        self.cause: ValueError | None = None
        self._bindings = bindings
        self._missing: dict[str, str] = {}
        self._open_macros: list[str] = []

    def build(self, cls: type, scope: str, path: str, defaults: dict[str, Any]) -> Any:
        """Builds a `cls`; `defaults` are values that replace its own defaults."""
        key = (cls.__name__, scope, repr(defaults))
        if key not in self.nodes:
            # Entered while incomplete, so that the root comes first and an object inside itself is noticed.
            node = self.nodes[key] = Node(cls, scope, path, {}, None)
            annotations = typing.get_type_hints(cls)
            for name, field in fields_of(cls).items():
                default = defaults[name] if name in defaults else default_of(field)
                node.settings[name] = self._setting(node, name, annotations[name], default)
            node.instance = self._construct(node)
        node = self.nodes[key]
        if node.instance is None:
            return self._failed(f"{path}: @{cls.__name__}() would stand inside itself, at {node.path}")
        return node.instance

    def missing_values(self) -> list[str]:
        """One message for all that is required and not given."""
        if not self._missing:
            return []
        for binding in self._bindings.in_force():
            if binding.value == REQUIRED:
                self._require(binding)
        count = "1 value is missing" if len(self._missing) == 1 else f"{len(self._missing)} values are missing"
        lines = [f"    {name}: pass --gin.{name}=... ({why})" for name, why in self._missing.items()]
        return ["\n".join([f"{count}:", *lines])]

    def _failed(self, problem: str) -> Any:
        self.problems[problem] = None
        return _FAILED

    def _unknown(self, binding: Binding, problem: str) -> Any:
        self.unknown[f"{binding.name} ({binding.origin}): {problem}"] = None
        return _FAILED

    def _setting(self, node: Node, field: str, annotation: Any, default: Any) -> Setting:
        path = f"{node.path}.{field}"
        candidates = self._bindings.candidates(node.cls, field, node.scope)
        if (self._bindings.source(candidates[-1]).value == REQUIRED) if candidates else default is dataclasses.MISSING:
            # That is reported; bindings for what could stand here are no second mistake.
            for option in configurables(annotation):
                self._follow(option, node.scope, self._limit, lambda it, cls=option: it.build(cls, node.scope, "", {}))
        if candidates:
            binding = self._in_force(candidates, node.scope)
            if default is not dataclasses.MISSING:
                limit = min(self._limit, candidates[-1].order)
                self._follow(repr(default), node.scope, limit, lambda it: it._rebuild(default, node.scope, ""))
            return self._bound(binding, annotation, node.scope, path) if binding else Setting(_FAILED, None, None)
        if default is dataclasses.MISSING:
            self._missing[f"{node.cls.__name__}.{field}"] = f"{describe(annotation)}; for {path}"
            return Setting(_FAILED, None, None)
        value = self._rebuild(default, node.scope, path)
        return Setting(value, None, value)

    def _in_force(self, candidates: list[Binding], scope: str) -> Binding | None:
        """The last of these, which is read, unless it comes after the limit; those that it replaces are followed."""
        *replaced, last = candidates
        limit = min(self._limit, last.order)
        for binding in replaced:
            if binding.order < limit:
                self.read.add(binding)
                self._follow(binding, scope, limit, lambda it, b=binding: it._evaluate(b.value, b, scope, ""))
        if last.order >= self._limit:
            return None
        self.read.add(last)
        return last

    def _follow(self, what: Any, scope: str, limit: float, read: Callable[["_Builder"], Any]) -> None:
        if (what, scope, limit) not in self._followed:
            self._followed.add((what, scope, limit))
            read(_Builder(self._bindings, self, limit))

    def _bound(self, binding: Binding, annotation: Any, scope: str, path: str) -> Setting:
        value = self._evaluate(binding.value, binding, scope, path)
        if value is _FAILED:
            return Setting(_FAILED, binding, None)
        # `--gin.MODEL_DIR=2026` reads as a number, yet a field of type str wants it as it was typed.
        typed = self._bindings.source(binding).text
        for candidate in (value,) if typed is None else (value, typed):
            try:
                fitting = coerce(candidate, annotation)
            except MismatchError:
                continue
            again = binding.value if candidate is value and not has_objects(fitting) else fitting
            return Setting(fitting, binding, again)
        return Setting(self._failed(self._mismatch(binding, value, annotation)), binding, None)

    def _mismatch(self, binding: Binding, value: Any, annotation: Any) -> str:
        source = self._bindings.source(binding)
        through = "" if source is binding else f", {source.name} from {source.origin}"
        got = f"got {unparse(value)} ({binding.origin}{through})"
        hint = did_you_mean(str(value), map(str, choices(annotation)), repr)
        if isinstance(value, Reference):
            hint = "; add () to build it"
        return f"{binding.name} must be {describe(annotation)}, {got}{hint}"

    def _evaluate(self, value: Any, binding: Binding, scope: str, path: str) -> Any:
        match value:
            case Macro():
                return self._macro(value, binding, scope, path)
            case Reference() if value.cls not in REGISTRY:
                return self._unknown(binding, no_class(value.cls))
            case Reference(called=True):
                return self.build(REGISTRY[value.cls], value.scope or scope, path, {})
            case Operation():
                return self._operation(value, binding, scope, path)
            case list() | tuple():
                return _all_or_failed([self._evaluate(item, binding, scope, path) for item in value])
        return value

    def _macro(self, macro: Macro, user: Binding, scope: str, path: str) -> Any:
        if macro == REQUIRED:
            self._require(user)
            return _FAILED
        if macro.name not in self._bindings.history:
            hint = did_you_mean(macro.name, self._bindings.macros())
            return self._unknown(user, f"macro {macro.name} is not defined{hint}")
        if macro.name in self._open_macros:
            circle = self._open_macros[self._open_macros.index(macro.name) :]
            first = circle.index(min(circle))
            shown = " -> ".join([*circle[first:], *circle[:first], circle[first]])
            return self._failed(f"macros refer to each other: {shown}")
        binding = self._in_force(self._bindings.history[macro.name], scope)
        if binding is None:
            return _FAILED
        self._open_macros.append(macro.name)
        value = self._evaluate(binding.value, binding, scope, path)
        self._open_macros.pop()
        return value

    def _require(self, binding: Binding) -> None:
        earlier = [known for known in self._bindings.history[binding.name] if known.value != REQUIRED]
        after = f", after {earlier[-1].origin} set it: the later file wins" if earlier else ""
        self._missing[binding.name] = f"declared at {binding.origin}{after}"

    def _operation(self, value: Operation, binding: Binding, scope: str, path: str) -> Any:
        left = self._evaluate(value.left, binding, scope, path)
        right = self._evaluate(value.right, binding, scope, path)
        if left is _FAILED or right is _FAILED:
            return _FAILED
        try:
            if type(left) not in (int, float) or type(right) not in (int, float):
                raise ArithmeticError("arithmetic is for numbers")
            if value.operator == "**" and abs(right) > 100:
                # An int grows without end: 9 ** 9 ** 9 would not return.
                raise ArithmeticError("an exponent is at most 100")
            if type(left) is int and type(right) is int and left.bit_length() + right.bit_length() > 1000:
                raise ArithmeticError("numbers are at most 1000 bits long")
            return _OPERATORS[value.operator](left, right)
        except ArithmeticError as error:
            # Python writes no integer of more than 4,300 digits.
            write = lambda n: f"a number of {n.bit_length()} bits" if type(n) is int and abs(n) >> 1000 else unparse(n)
            shown = f"{write(left)} {value.operator} {write(right)}"
            return self._failed(f"{binding.name} ({binding.origin}): cannot compute {shown}: {error}")

    def _rebuild(self, default: Any, scope: str, path: str) -> Any:
        """Builds the configurable objects in a default anew, so that bindings apply to them."""
        if isinstance(default, tuple):
            return _all_or_failed([self._rebuild(item, scope, path) for item in default])
        if not is_configurable(type(default)):
            return default
        changed = {
            name: getattr(default, name)
            for name, field in fields_of(type(default)).items()
            if getattr(default, name) != default_of(field)
        }
        return self.build(type(default), scope, path, changed)

    def _construct(self, node: Node) -> Any:
        values = {name: setting.value for name, setting in node.settings.items()}
        if not self._constructs or any(value is _FAILED for value in values.values()):
            return _FAILED
        try:
            return node.cls(**values)
        except ValueError as error:
            self.cause = error
            name = node.cls.__name__
            lines = [str(error), f"    while building {node.path}, {'an' if name[0] in 'AEIO' else 'a'} {name}"]
            for name, (value, binding, _) in node.settings.items():
                if binding is not None:
                    lines.append(f"    with {name} = {unparse(value)} ({binding.origin})")
            return self._failed("\n".join(lines))


def has_objects(value: Any) -> bool:
    """Whether a value is, or holds, an object of the run."""
    return any(map(has_objects, value)) if isinstance(value, tuple) else is_configurable(type(value))


def _all_or_failed(items: list[Any]) -> Any:
    return _FAILED if any(item is _FAILED for item in items) else tuple(items)
