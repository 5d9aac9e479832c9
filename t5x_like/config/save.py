"""Records a run: `operative_config.gin`, which rebuilds it, and `config.json`, which describes it."""

import datetime
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

import t5x_like
from t5x_like.config.bindings import Bindings, Reference, macros_in, unparse
from t5x_like.config.check import default_of, fields_of
from t5x_like.config.resolve import Config, has_objects
from t5x_like.configurable import to_dict
from t5x_like.errors import UserError
from t5x_like.files import write_atomic
from t5x_like.runtime.versions import versions


def operative_config_text(config: Config, root: type) -> str:
    """Returns one flat gin file of all that a run uses, defaults included: it rebuilds equal objects.

    Macros with plain values stay macros, so that `--gin.STEPS=...` works on the saved file too.
    """
    nodes = config.resolve(root)
    names = _unique_names((id(node.instance), node.cls, node.scope, node.path) for node in nodes)
    objects = {names[id(node.instance)]: {f: s.expression for f, s in node.settings.items()} for node in nodes}
    macros: set[str] = set()
    for settings in objects.values():
        _add_macros(tuple(settings.values()), config.bindings, macros)
    head = "# Everything this run uses, defaults included; give this file as --gin_file to build the same run."
    kept = (binding for binding in config.bindings.in_force() if binding.name in macros)
    macro_lines = "\n".join(f"{binding.name} = {unparse(binding.value)}" for binding in kept)
    return _text([head, macro_lines], objects, lambda instance: names[id(instance)])


def config_text(macro: str, value: Any) -> str:
    """Returns a gin file that binds `macro` to a configurable object: what differs from the defaults.

    Of unequal objects of one class, all but the first have a scope named by their path, and all fields are written.
    """
    paths = {item: path for path, item in reversed(list(_objects(value, "")))}
    order = dict.fromkeys(item for _, item in _objects(value, ""))
    names = _unique_names((item, type(item), "", paths[item]) for item in order)
    scoped = {item for item, name in names.items() if "/" in name}

    def is_written(item: Any, field: str) -> bool:
        setting = getattr(item, field)
        parts = setting if isinstance(setting, tuple) else (setting,)
        return item in scoped or setting != default_of(fields_of(type(item))[field]) or any(p in scoped for p in parts)

    objects = {
        name: {field: getattr(item, field) for field in fields_of(type(item)) if is_written(item, field)}
        for item, name in names.items()
    }
    return _text([f"{macro} = @{names[value]}()"], objects, names.__getitem__)


def _text(head: list[str], objects: dict[str, dict[str, Any]], name_of: Callable[[Any], str]) -> str:
    """The lines of `head`, then the bindings of each object, which are its fields' expressions by its name."""

    def shown(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(shown, value))
        if has_objects(value):
            scope, _, cls = name_of(value).rpartition("/")
            return Reference(scope, cls)
        return value

    blocks = (
        "\n".join(f"{name}.{field} = {unparse(shown(value))}" for field, value in settings.items())
        for name, settings in objects.items()
    )
    return "\n\n".join(filter(None, [*head, *blocks])) + "\n"


def _unique_names(objects: Iterable[tuple[Any, type, str, str]]) -> dict[Any, str]:
    """Names each (key, class, scope, path) `Class` or `scope/Class`; where that is taken, its path is the scope."""
    names: dict[Any, str] = {}
    for key, cls, scope, path in objects:
        scopes = itertools.chain([scope], (f"{path.replace('.', '_')}{number or ''}" for number in itertools.count()))
        candidates = (f"{scope}/{cls.__name__}" if scope else cls.__name__ for scope in scopes)
        names[key] = next(name for name in candidates if name not in names.values())
    return names


def _objects(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """An object and all in its fields, each with the path of the field."""
    if isinstance(value, tuple):
        for item in value:
            yield from _objects(item, path)
    elif has_objects(value):
        yield path, value
        for field in fields_of(type(value)):
            yield from _objects(getattr(value, field), f"{path}.{field}" if path else field)


def _add_macros(expression: Any, bindings: Bindings, macros: set[str]) -> None:
    """Adds to `macros` those that an expression mentions, and those that they mention."""
    for name in macros_in(expression):
        macros.add(name)
        _add_macros(bindings.history[name][-1].value, bindings, macros)


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
