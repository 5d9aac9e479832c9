"""Finds bindings that name nothing, and bindings that have no effect on the run."""

import dataclasses
import math
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from t5x_like.config.bindings import REQUIRED, Binding, Bindings, Macro, Operation, Reference, did_you_mean, unparse
from t5x_like.config.types import configurables, describe, is_configurable
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


def without_effect(bindings: Bindings, root: type, built: Iterable[tuple[type, str]]) -> Iterator[str]:
    """One message for each binding that changes nothing in a run of `root`.

    A binding may be replaced by a later one, and then what only the replaced one used is no mistake either: a run that
    swaps the optimizer of an included file may keep the old one's settings there. Settings made after the swap, or on
    the command line, are mistakes.

    Args:
      bindings: All bindings.
      root: The class of the run.
      built: The class and scope of every object that the run builds.
    """
    reached = _Reached(bindings)
    reached.visit(root, "", math.inf)
    for binding in bindings.in_force():
        if binding not in reached.bindings and _unknown(binding, bindings) is None:
            yield f"{binding.name} ({binding.origin}) is never used{_reason(binding, bindings, reached, built)}"


def _reason(binding: Binding, bindings: Bindings, reached: "_Reached", built: Iterable[tuple[type, str]]) -> str:
    if binding.is_macro:
        return did_you_mean(binding.name, (used.name for used in reached.bindings if used.is_macro))
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


class _Reached:
    """Collects the bindings that a run reads, or would read if nothing were overridden.

    Everything carries a `limit`: the order of the binding that took its place. Only earlier bindings count as reached.
    """

    def __init__(self, bindings: Bindings) -> None:
        self.bindings: set[Binding] = set()
        self._all = bindings
        self._seen: set[tuple[type | Binding, str, float]] = set()

    def visit(self, cls: type, scope: str, limit: float) -> None:
        if (cls, scope, limit) in self._seen:
            return
        self._seen.add((cls, scope, limit))
        annotations = typing.get_type_hints(cls)
        for name, field in fields_of(cls).items():
            candidates, default = self._all.candidates(cls, name, scope), default_of(field)
            missing = (
                self._all.source(candidates[-1]).value == REQUIRED if candidates else default is dataclasses.MISSING
            )
            if missing:
                # That is reported; bindings for what could stand here are no second mistake.
                for option in configurables(annotations[name]):
                    self.visit(option, scope, limit)
            self._choose(candidates, default, scope, limit)

    def _choose(self, candidates: list[Binding], default: Any, scope: str, limit: float) -> None:
        if not candidates:
            self._walk(default, scope, limit)
            return
        *overridden, winner = candidates
        self._read(winner, scope, limit)
        for binding in overridden:
            self._read(binding, scope, min(limit, winner.order))
        self._walk(default, scope, min(limit, winner.order))

    def _read(self, binding: Binding, scope: str, limit: float) -> None:
        if binding.order < limit and (binding, scope, limit) not in self._seen:
            self._seen.add((binding, scope, limit))
            self.bindings.add(binding)
            self._walk(binding.value, scope, limit)

    def _walk(self, value: Any, scope: str, limit: float) -> None:
        match value:
            case Macro() if value.name in self._all.history:
                self._choose(self._all.history[value.name], None, scope, limit)
            case Reference() if value.cls in REGISTRY:
                self.visit(REGISTRY[value.cls], value.scope or scope, limit)
            case Operation():
                self._walk((value.left, value.right), scope, limit)
            case list() | tuple():
                for item in value:
                    self._walk(item, scope, limit)
            case _ if is_configurable(type(value)):
                self.visit(type(value), scope, limit)
                self._walk(tuple(vars(value).values()), scope, limit)
