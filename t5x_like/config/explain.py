"""Tells where the values of a run come from: `--print_config` and `--explain NAME`."""

import dataclasses
import inspect
import re
import typing

from t5x_like.config.bindings import Binding, Bindings, ConfigError, did_you_mean, macros_in, unparse
from t5x_like.config.check import default_of, fields_of, no_class, no_field
from t5x_like.config.resolve import Config, Node, Setting
from t5x_like.config.types import describe
from t5x_like.configurable import REGISTRY
from t5x_like.errors import UserError


def print_config(config: Config, root: type) -> str:
    """Returns the tree of a run: one line per field, with its origin."""
    nodes = config.resolve(root)
    node_of = {id(node.instance): node for node in nodes}
    lines = [(f"@{root.__name__}()", "")]

    def add(node: Node, indent: str) -> None:
        for name, setting in node.settings.items():
            lines.append((f"{indent}{name} = {unparse(setting.value)}", f"  # {origin_of(setting, config.bindings)}"))
            for value in setting.value if isinstance(setting.value, tuple) else (setting.value,):
                if dataclasses.is_dataclass(value):
                    add(node_of[id(value)], f"{indent}  ")

    add(nodes[0], "  ")
    width = min(60, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}{origin}" if origin else text for text, origin in lines)


def origin_of(setting: Setting, bindings: Bindings) -> str:
    """Says who set a field: "default", "runs/a.gin:3", "command line", "STEPS, runs/a.gin:1"."""
    if setting.binding is None:
        return "default"
    source = bindings.source(setting.binding)
    return source.origin if source is setting.binding else f"{source.name}, {source.origin}"


def explain(config: Config, root: type, name: str) -> str:
    """Explains `Class`, `Class.field` or a macro: type, default, documentation, value, and who set it.

    Raises:
      ConfigError: if there is nothing of that name; it names the nearest.
    """
    if name in config.bindings.macros():
        return _explain_macro(name, config.bindings)
    cls, _, field = name.partition(".")
    if cls not in REGISTRY:
        known = [*REGISTRY, *config.bindings.macros()]
        problem = no_class(cls) if field else f"there is no class or macro {name}{did_you_mean(name, known)}"
        raise ConfigError(f"--explain={name}: {problem}")
    if field and field not in fields_of(REGISTRY[cls]):
        raise ConfigError(f"--explain={name}: {no_field(REGISTRY[cls], field)}")
    try:
        nodes, note = config.resolve(root), []
    except UserError as error:
        # Without any configuration there are no values to miss.
        why = f"(values are left out: this configuration does not build: {error})"
        nodes, note = None, [why] if config.bindings.history else []
    fields = [field] if field else list(fields_of(REGISTRY[cls]))
    head = [] if field else [f"{cls}: {inspect.getdoc(REGISTRY[cls]).splitlines()[0]}"]
    return "\n".join([*head, *(_explain_field(REGISTRY[cls], name, nodes, config.bindings) for name in fields), *note])


def _explain_field(cls: type, name: str, nodes: list[Node] | None, bindings: Bindings) -> str:
    default = default_of(fields_of(cls)[name])
    lines = [
        f"{cls.__name__}.{name}: {describe(typing.get_type_hints(cls)[name])}",
        f"    {field_docs(cls).get(name, 'not documented')}",
        "    required" if default is dataclasses.MISSING else f"    default: {unparse(default)}",
    ]
    for node in nodes or ():
        if node.cls is cls:
            setting = node.settings[name]
            value = f"{unparse(setting.value)} ({origin_of(setting, bindings)})"
            lines.append(f"    {node.path}.{name} = {value}")
    if nodes and not any(node.cls is cls for node in nodes):
        lines.append(f"    this run has no {cls.__name__}")
    return "\n".join(lines)


def _explain_macro(name: str, bindings: Bindings) -> str:
    def line(prefix: str, binding: Binding) -> str:
        return f"{prefix}{unparse(binding.value)} ({binding.origin})"

    *earlier, macro = bindings.history[name]
    users = [user.name for user in bindings.in_force() if name in macros_in(user.value)]
    return "\n".join(
        [
            line(f"{name} = ", macro),
            *(line("    overrides ", binding) for binding in reversed(earlier)),
            f"    used by {', '.join(users) or 'nothing'}",
        ]
    )


def field_docs(cls: type) -> dict[str, str]:
    """Returns the entries of the `Attributes:` sections of a class and of bases with fields, each on one line."""
    docs = {}
    for known in [*filter(dataclasses.is_dataclass, reversed(cls.__mro__[1:])), cls]:
        _, _, section = inspect.cleandoc(known.__doc__ or "").partition("Attributes:\n")
        # An entry starts at the section's own indentation, `  name: text`; deeper lines continue it.
        entries = re.findall(r"^ {2,4}(\w+): (.*(?:\n {4,}.*)*)", section.split("\n\n")[0], re.MULTILINE)
        docs |= {name: " ".join(text.split()) for name, text in entries}
    return docs
