"""The decorator that makes a class part of a run's configuration."""

import dataclasses
from typing import TypeVar, dataclass_transform

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
