"""Records a run: `operative_config.gin`, which rebuilds it, and `config.json`, which describes it."""

import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import t5x_like
from t5x_like.config.bindings import Bindings, Reference, macros_in, unparse
from t5x_like.config.check import default_of, fields_of
from t5x_like.config.resolve import Config, Node, has_objects
from t5x_like.configurable import to_dict
from t5x_like.errors import UserError
from t5x_like.files import write_atomic
from t5x_like.runtime.versions import versions


def operative_config_text(config: Config, root: type) -> str:
    """Returns one flat gin file of all that a run uses, defaults included: it rebuilds equal objects.

    Macros with plain values stay macros, so that `--gin.STEPS=...` works on the saved file too.
    """
    nodes = config.resolve(root)
    names = _unique_names(nodes)
    macros: set[str] = set()
    blocks = []
    for node in nodes:
        lines = []
        for field, setting in node.settings.items():
            expression = _with_references(setting.expression, names)
            _add_macros(expression, config.bindings, macros)
            lines.append(f"{names[id(node.instance)]}.{field} = {unparse(expression)}")
        blocks.append("\n".join(lines))
    head = "# Everything this run uses, defaults included; give this file as --gin_file to build the same run."
    kept = (binding for binding in config.bindings.in_force() if binding.name in macros)
    settings = "\n".join(f"{binding.name} = {unparse(binding.value)}" for binding in kept)
    return "\n\n".join(filter(None, [head, settings, *blocks])) + "\n"


def _unique_names(nodes: list[Node]) -> dict[int, str]:
    """Names each object `Class` or `scope/Class`; where its own scope is taken, its path becomes the scope."""
    names: dict[int, str] = {}
    for node in nodes:
        name = f"{node.scope}/{node.cls.__name__}" if node.scope else node.cls.__name__
        if name in names.values():
            name = f"{node.path.replace('.', '_')}/{node.cls.__name__}"
        names[id(node.instance)] = name
    return names


def _with_references(value: Any, names: dict[int, str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_with_references(item, names) for item in value)
    if has_objects(value):
        scope, _, cls = names[id(value)].rpartition("/")
        return Reference(scope, cls)
    return value


def _add_macros(expression: Any, bindings: Bindings, macros: set[str]) -> None:
    """Adds to `macros` those that an expression mentions, and those that they mention."""
    for name in macros_in(expression):
        macros.add(name)
        _add_macros(bindings.history[name][-1].value, bindings, macros)


def config_text(macro: str, value: Any) -> str:
    """Returns a gin file that binds `macro` to a configurable object: what differs from the defaults.

    Of unequal objects of one class, each has a scope named by its path, and all of its fields are written.
    """
    objects = list(_objects(value, ""))
    paths = {item: path.replace(".", "_") for path, item in reversed(objects)}
    classes = [type(item) for item in paths]
    scoped = {cls for cls in classes if classes.count(cls) > 1}

    def name(item: Any) -> str:
        return f"{paths[item]}/{type(item).__name__}" if type(item) in scoped else type(item).__name__

    def shown(setting: Any) -> str:
        return f"@{name(setting)}()" if has_objects(setting) else unparse(setting)

    blocks = []
    for item in dict.fromkeys(item for _, item in objects):
        settings = {field: getattr(item, field) for field in fields_of(type(item))}
        blocks.append(
            "\n".join(
                f"{name(item)}.{field} = {shown(setting)}"
                for field, setting in settings.items()
                if {type(item), type(setting)} & scoped or setting != default_of(fields_of(type(item))[field])
            )
        )
    return "\n\n".join([f"{macro} = @{name(value)}()", *filter(None, blocks)]) + "\n"


def _objects(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """An object and all in its fields, each with the path of the field."""
    yield path, value
    for field in fields_of(type(value)):
        if has_objects(part := getattr(value, field)):
            yield from _objects(part, f"{path}.{field}" if path else field)


def save_run_config(directory: str | Path, config: Config, experiment: Any) -> None:
    """Writes `operative_config.gin` and `config.json` into the run directory; neither is ever seen half written.

    Raises:
      UserError: if the directory cannot be written.
    """
    description = {
        "experiment": to_dict(experiment),
        "argv": sys.argv,
        "gin_files": config.files,
        "gin_bindings": config.overrides,
        "versions": versions(),
        "git_revision": _git_revision(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "hosts": jax.process_count()},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    texts = {
        "operative_config.gin": operative_config_text(config, type(experiment)),
        "config.json": json.dumps(description, indent=2) + "\n",
    }
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(Path(directory) / name, text)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from error


def _git_revision() -> str | None:
    """The revision of the checkout that the package is imported from; None for an installed package."""
    checkout = Path(t5x_like.__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
