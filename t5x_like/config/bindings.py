"""What a configuration says before anything is built: names bound to expressions."""

import dataclasses
import difflib
import enum
from collections.abc import Callable, Iterable
from typing import Any

from t5x_like.errors import UserError


class ConfigError(UserError):
    """The configuration cannot work: the message names the binding, where it stands, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/Class()`, or `@scope/Class` where `called` is false."""

    scope: str
    cls: str
    called: bool = True


@dataclasses.dataclass(frozen=True)
class Operation:
    """`left operator right`, over numbers and macros."""

    operator: str
    left: Any
    right: Any


REQUIRED = Macro("gin.REQUIRED")


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """One statement `name = value`.

    Attributes:
      name: `MACRO`, `Class.field` or `scope/Class.field`.
      value: A plain value, `Macro`, `Reference`, `Operation`, or a list or tuple of these.
      origin: `file:line`, or "command line".
      order: Position among all bindings; those of the command line share the last.
      text: The value as typed, on the command line only: what a field of type str receives.
    """

    name: str
    value: Any
    origin: str
    order: int = 0
    text: str | None = None

    @property
    def is_macro(self) -> bool:
        return "." not in self.name

    @property
    def parts(self) -> tuple[str, str, str]:
        """The scope, the class and the field."""
        scope, _, selector = self.name.rpartition("/")
        cls, _, field = selector.rpartition(".")
        return scope, cls, field


class Bindings:
    """All bindings by name; of those with one name the last is in force."""

    def __init__(self, bindings: Iterable[Binding]) -> None:
        self.history: dict[str, list[Binding]] = {}
        for binding in bindings:
            self.history.setdefault(binding.name, []).append(binding)

    def in_force(self) -> list[Binding]:
        return [bindings[-1] for bindings in self.history.values()]

    def macros(self) -> list[str]:
        return [binding.name for binding in self.in_force() if binding.is_macro]

    def candidates(self, cls: type, field: str, scope: str) -> list[Binding]:
        """All bindings that apply to a field of an object built in `scope`, the one in force last."""
        found = list(self.history.get(f"{cls.__name__}.{field}", ()))
        parts = scope.split("/") if scope else []
        for depth in range(1, len(parts) + 1):
            found += self.history.get(f"{'/'.join(parts[:depth])}/{cls.__name__}.{field}", ())
        return found

    def source(self, binding: Binding) -> Binding:
        """Follows `field = %A`, `A = %B` to the binding that states the value."""
        seen = set()
        while isinstance(binding.value, Macro) and binding.value.name in self.history and binding not in seen:
            seen.add(binding)
            binding = self.history[binding.value.name][-1]
        return binding


def unparse(value: Any) -> str:
    """Writes a value or an expression in gin's grammar; of an object, the class alone."""
    match value:
        case Macro():
            return f"%{value.name}"
        case Reference():
            return f"@{value.scope}{'/' if value.scope else ''}{value.cls}{'()' if value.called else ''}"
        case Operation():
            return f"({unparse(value.left)} {value.operator} {unparse(value.right)})"
        case list():
            return f"[{', '.join(map(unparse, value))}]"
        case tuple():
            return f"({', '.join(map(unparse, value))}{',' if len(value) == 1 else ''})"
        case enum.Enum():
            return repr(value.name)
    return f"@{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)


def macros_in(value: Any) -> list[str]:
    """The names of the macros that an expression mentions."""
    match value:
        case Macro():
            return [value.name]
        case Operation():
            return macros_in((value.left, value.right))
        case list() | tuple():
            return [name for item in value for name in macros_in(item)]
    return []


def did_you_mean(name: str, candidates: Iterable[str], show: Callable[[str], str] = str) -> str:
    """Returns "; did you mean A or B?" for the (at most three) nearest candidates, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in candidates if candidate != name}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3)
    return f"; did you mean {' or '.join(show(by_lower[match]) for match in near)}?" if near else ""
