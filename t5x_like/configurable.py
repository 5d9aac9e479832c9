"""The decorator that makes a class part of a run's configuration, and such objects as plain data."""

import dataclasses
import enum
import json
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

REGISTRY: dict[str, type] = {}
"""Configurable classes by name: what a gin file may bind."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configurable(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass whose fields gin may set under its class name.

    Fields are documented in the `Attributes:` section of the class docstring and validated in `__post_init__`.

    Raises:
      ValueError: if another class of that name is registered.
    """
    known = REGISTRY.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{cls.__name__} is already a configurable of {known.__module__}: choose another name.")
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    REGISTRY[cls.__name__] = cls
    return cls


def to_dict(value: Any) -> Any:
    """Returns an object of the run as plain nested dicts, each naming its class; equal objects give equal dicts."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value.name if isinstance(value, enum.Enum) else value


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lists where two results of `to_dict` differ: "model.stack.num_layers: 12 -> 24"."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{path}: {_shown(old)} -> {_shown(new)}"]
    names = [*old, *(name for name in new if name not in old)]
    prefix = f"{path}." if path else ""
    return [line for name in names for line in difference(old.get(name), new.get(name), f"{prefix}{name}")]


def _shown(value: Any) -> str:
    return value["class"] if isinstance(value, dict) else json.dumps(value)
