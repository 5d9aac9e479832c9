"""Checks a configured value against the annotation of the field that receives it."""

import enum
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from t5x_like.configurable import REGISTRY, players_of


class MismatchError(Exception):
    """A value does not fit an annotation."""


def coerce(value: Any, annotation: Any) -> Any:
    """Returns `value` as `annotation` wants it: an int for a float, a list for a tuple, a name for an Enum member.

    Annotations are int, float, bool, str, None, Literal, Enum, tuple, configurable classes, roles, and unions of these.

    Raises:
      MismatchError: if it does not fit.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple:
        return _coerce_tuple(value, arguments)
    elif annotation in (None, type(None)):
        if value is None:
            return None
    elif issubclass(annotation, enum.Enum):
        return _coerce_enum(value, annotation)
    elif annotation is float and type(value) is int:
        return float(value)
    elif isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    raise MismatchError


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    """Prefers the member that takes the value as it is: 3 stays an int for `float | int`."""
    fitting = []
    for member in members:
        try:
            fitting.append(coerce(value, member))
        except MismatchError:
            continue
    if not fitting:
        raise MismatchError
    return next((fit for fit in fitting if type(fit) is type(value)), fitting[0])


def _coerce_tuple(value: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise MismatchError
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise MismatchError
    return tuple(coerce(item, annotation) for item, annotation in zip(value, items, strict=True))


def _coerce_enum(value: Any, annotation: type[enum.Enum]) -> enum.Enum:
    if isinstance(value, str) and value in annotation.__members__:
        return annotation[value]
    try:
        return annotation(value)
    except ValueError:
        raise MismatchError from None


def describe(annotation: Any) -> str:
    """Returns the annotation in words: "int or None", "'relu', 'gelu' or 'silu'", "tuple of str"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _either(map(describe, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"tuple of {describe(arguments[0])}"
    if origin is tuple:
        return f"tuple of ({', '.join(map(describe, arguments))})"
    if options := choices(annotation):
        return _either(map(repr, options))
    if annotation in (None, type(None)):
        return "None"
    if (players := configurables(annotation)) and not is_configurable(annotation):
        return f"{annotation.__name__} ({_either(cls.__name__ for cls in players)})"
    return "bool (true or false)" if annotation is bool else annotation.__name__


def _either(options: Iterable[str]) -> str:
    *head, last = options
    return f"{', '.join(head)} or {last}" if head else last


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values that a Literal, or an Enum by name, offers, also inside a union or a tuple."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return tuple(annotation.__members__)
    return tuple(choice for argument in get_args(annotation) for choice in choices(argument))


def configurables(annotation: Any) -> list[type]:
    """The configurable classes that a field of this annotation takes: of a role, all that play it."""
    if isinstance(annotation, type):
        return players_of(annotation)
    return [cls for argument in get_args(annotation) for cls in configurables(argument)]


def is_configurable(cls: Any) -> bool:
    return isinstance(cls, type) and REGISTRY.get(cls.__name__) is cls
