"""The decorator that makes a class part of a run's configuration, and such objects as plain data.

A part of a run is found by its role: an abstract base class, e.g. `Algorithm`. A field annotated with a role takes any
registered class that derives from it, so a part of your own is a class in a module named by `--plugin`. What a role
asks of a part, the base says: others call its methods and never look at its type.
"""

import dataclasses
import enum
import importlib
import inspect
import json
import pkgutil
from typing import Any, TypeVar, dataclass_transform

from t5x_like.errors import UserError

T = TypeVar("T")

REGISTRY: dict[str, type] = {}
"""Configurable classes by name: what a gin file may bind."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configurable(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass whose fields gin may set under its class name.

    Fields are documented in the `Attributes:` section of the class docstring and validated in `__post_init__`.

    Raises:
      UserError: if another class of that name is registered, or `cls` lacks a method of its role.
    """
    known = REGISTRY.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(f"{cls.__name__} is already a configurable of {known.__module__}: choose another name.")
    if inspect.isabstract(cls):
        asked = [f"{role.__name__} ({', '.join(sorted(role.__abstractmethods__))})" for role in roles_of(cls)]
        raise UserError(
            f"{cls.__name__} lacks {', '.join(sorted(cls.__abstractmethods__))}: define all methods of its role "
            f"{' and '.join(asked)}."
        )
    inherited = {
        field.name for base in filter(dataclasses.is_dataclass, cls.__mro__) for field in dataclasses.fields(base)
    }
    for name in inspect.get_annotations(cls).keys() - inherited - vars(cls).keys():
        # A field without a default is required, also where the role has an attribute of that name.
        setattr(cls, name, dataclasses.field())
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    REGISTRY[cls.__name__] = cls
    return cls


def inert(default: T) -> T:
    """The default of a field that does not change what a model computes from its weights: see `active`."""
    return dataclasses.field(default=default, metadata={"inert": True})


def active(value: T) -> T:
    """An object of the run with every inert field, of it and of its parts, at its default."""
    if isinstance(value, tuple):
        return tuple(map(active, value))
    if not dataclasses.is_dataclass(value):
        return value
    fields = {
        field.name: field.default if field.metadata.get("inert") else active(getattr(value, field.name))
        for field in dataclasses.fields(value)
    }
    return dataclasses.replace(value, **fields)


def roles_of(cls: type) -> list[type]:
    """The roles that a class plays: its abstract bases."""
    return [base for base in cls.__mro__[1:] if inspect.isabstract(base)]


def players_of(role: type) -> list[type]:
    """The registered classes that a field annotated with `role` takes."""
    return [cls for cls in REGISTRY.values() if issubclass(cls, role)]


def import_parts(*packages: str) -> None:
    """Imports every module of these packages, not of those inside them, so that the parts in them are registered."""
    for package in packages:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            if not module.ispkg:
                importlib.import_module(module.name)


def to_dict(value: Any) -> Any:
    """Returns an object of the run as plain nested dicts, each naming its class; equal objects give equal dicts."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value.name if isinstance(value, enum.Enum) else value


def from_dict(value: Any) -> Any:
    """The object of the run of which `to_dict` made this.

    Raises:
      UserError: if a class is not registered here, or has other fields or limits than those of the saved object.
    """
    if isinstance(value, list):
        return tuple(map(from_dict, value))
    if not isinstance(value, dict):
        return value
    name = value["class"]
    if name not in REGISTRY:
        raise UserError(f"The saved configuration has a {name}, which nothing registers: import its module first.")
    fields = {field.name for field in dataclasses.fields(REGISTRY[name])} | {"class"}
    if fields != value.keys():
        raise UserError(
            f"The saved {name} has other fields than this version of it ({', '.join(sorted(fields ^ value.keys()))}): "
            "use the version that saved it."
        )
    return REGISTRY[name](**{field: from_dict(item) for field, item in value.items() if field != "class"})


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lists where two results of `to_dict` differ: "model.stack.num_layers: 12 -> 24"."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{path}: {_shown(old)} -> {_shown(new)}"]
    names = [*old, *(name for name in new if name not in old)]
    prefix = f"{path}." if path else ""
    return [line for name in names for line in difference(old.get(name), new.get(name), f"{prefix}{name}")]


def _shown(value: Any) -> str:
    return value["class"] if isinstance(value, dict) else json.dumps(value)
