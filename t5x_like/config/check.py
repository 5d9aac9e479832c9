"""Finds bindings that name nothing, and bindings that have no effect on the run."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Set
from typing import Any

from t5x_like.config.bindings import Binding, Bindings, did_you_mean, unparse
from t5x_like.config.types import configurables, describe
from t5x_like.configurable import REGISTRY


def unknown_names(bindings: Bindings) -> Iterator[str]:
    """One message for each binding of a class or field that does not exist."""
    for binding in bindings.in_force():
        if (unknown := _unknown(binding, bindings)) is not None:
            yield f"{binding.name} ({binding.origin}): {unknown}"


def _unknown(binding: Binding, bindings: Bindings) -> str | None:
    _, cls, field = binding.parts
    if binding.is_macro and not binding.name.isupper():
        owners = [f"{name}.{binding.name}" for name, known in REGISTRY.items() if binding.name in fields_of(known)]
        hint = f"; did you mean {' or '.join(owners[:3])}?" if owners else did_you_mean(binding.name, bindings.macros())
        return f"neither a macro, in capitals, nor Class.field{hint}"
    if not binding.is_macro and cls not in REGISTRY:
        return no_class(cls)
    if not binding.is_macro and field not in fields_of(REGISTRY[cls]):
        return no_field(REGISTRY[cls], field)
    return None


def no_class(name: str) -> str:
    return f"there is no class {name}{did_you_mean(name.rpartition('.')[2], REGISTRY)}"


def no_field(cls: type, name: str) -> str:
    fields, annotations = fields_of(cls), typing.get_type_hints(cls)

    def signature(field: str) -> str:
        default = default_of(fields[field])
        shown = "required" if default is dataclasses.MISSING else f"default {unparse(default)}"
        return f"{field} ({describe(annotations[field])}, {shown})"

    return f"{cls.__name__} has no field {name}{did_you_mean(name, fields, signature)}"


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """The default of a dataclass field, or `dataclasses.MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def without_effect(bindings: Bindings, read: Set[Binding], built: Iterable[tuple[type, str]]) -> Iterator[str]:
    """One message for each binding that changes nothing in a run.

    Args:
      bindings: All bindings.
      read: Those that the run reads, or would read if nothing were replaced.
      built: The class and scope of every object that the run builds.
    """
    for binding in bindings.in_force():
        if binding not in read and _unknown(binding, bindings) is None:
            yield f"{binding.name} ({binding.origin}) is never used{_reason(binding, bindings, read, built)}"


def _reason(binding: Binding, bindings: Bindings, read: Set[Binding], built: Iterable[tuple[type, str]]) -> str:
    if binding.is_macro:
        return did_you_mean(binding.name, (used.name for used in read if used.is_macro))
    _, cls, field = binding.parts
    scopes = sorted({at for known, at in built if known is REGISTRY[cls]})
    if not scopes:
        takers = [
            f"{taker.__name__}.{name}"
            for taker, _ in built
            for name, annotation in typing.get_type_hints(taker).items()
            if REGISTRY[cls] in configurables(annotation)
        ]
        if takers:
            return f": this run has no {cls}; {' or '.join(dict.fromkeys(takers))} = @{cls}() would build one"
        return f": this run has no {cls}{did_you_mean(cls, (known.__name__ for known, _ in built))}"
    for at in scopes:
        if binding in (candidates := bindings.candidates(REGISTRY[cls], field, at)):
            return f": {candidates[-1].name} ({candidates[-1].origin}) overrides it"
    return f": this run builds {cls} {', '.join(f'in scope {at}' if at else 'without a scope' for at in scopes)}"
