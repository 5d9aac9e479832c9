"""What all commands share: flags, plugins, devices, the configuration, and how mistakes are shown."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from absl import flags

from t5x_like.config import Config, explain, parse_config, print_config
from t5x_like.config.parse import SHIPPED
from t5x_like.errors import UserError
from t5x_like.runtime.coordination import leave
from t5x_like.runtime.processes import Meeting, join

T = TypeVar("T")

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
"""Excludes operations whose order of additions varies, and the autotuning that may choose another kernel each time."""


def run(
    command: Callable[[flags.FlagValues], int | None],
    argv: Sequence[str] | None = None,
    define_flags: Callable[[flags.FlagValues], None] | None = None,
) -> int:
    """Runs a command and returns its exit code: 0, 2 after a mistake of the user, 130 when interrupted.

    Args:
      command: Called with the values of the flags; its docstring is what `--help` prints.
      argv: The arguments after the command's name; None: those of this process.
      define_flags: Adds the command's own flags: `flags.DEFINE_bool(..., flag_values=values)`.
    """
    values = flags.FlagValues()
    _define_shared_flags(values)
    if define_flags is not None:
        define_flags(values)
    try:
        _parse(values, sys.argv[1:] if argv is None else argv)
        if values.help:
            print(_help(command, values))
            return 0
        if values.deterministic:
            # XLA reads its flags when a device is first asked for.
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
        if values.num_cpu_devices is not None:
            _use_cpu_devices(values.num_cpu_devices)
        _use_compilation_cache(values.compilation_cache)
        for module in values.plugin:
            _import_plugin(module)
        return command(values) or 0
    except UserError as error:
        if jax.distributed.is_initialized():
            leave(error, code=2)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if jax.distributed.is_initialized():
            leave(error)
        raise


def configured(values: flags.FlagValues, root: type[T]) -> tuple[Config, T] | None:
    """Reads the configuration that the flags name and builds `root`; None if they only ask to print or explain it."""
    if not values.gin_file and values.explain is None:
        shipped = ", ".join(sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.glob("runs/*.gin")))
        raise UserError(f"no configuration: pass --gin_file=FILE; shipped are {shipped}")
    return built(values, root)


def built(values: flags.FlagValues, root: type[T]) -> tuple[Config, T] | None:
    """As `configured`, for what needs no file."""
    config = parse_config(values.gin_file, values.gin_bindings, values.gin_search_paths)
    if values.explain is not None:
        print(explain(config, root, values.explain))
        return None
    if values.print_config:
        print(print_config(config, root))
        return None
    return config, config.build(root)


def define_process_flags(values: flags.FlagValues) -> None:
    """The flags of commands that several processes may run together."""
    default = Meeting()
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, where several processes meet.", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        "start_seconds", default.start_seconds, "How long each waits for the others.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "heartbeat_seconds",
        default.heartbeat_seconds,
        "How long a process may be silent before the others take it for dead.",
        lower_bound=1,
        flag_values=values,
    )


def join_processes(values: flags.FlagValues) -> None:
    """Joins the other processes of the run, if the flags or the environment tell of any."""
    join(Meeting(**{name: values[name].value for name in Meeting._fields}))


def _define_shared_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given again, the later wins.", flag_values=values)
    flags.DEFINE_multi_string(
        "gin_bindings", [], "A binding NAME=VALUE; --gin.NAME=VALUE is the same, shorter.", flag_values=values
    )
    flags.DEFINE_list("gin_search_paths", [], "Directories to look for gin files in.", flag_values=values)
    flags.DEFINE_multi_string(
        "plugin", [], "A module to import first: it registers configurables of its own.", flag_values=values
    )
    flags.DEFINE_integer(
        "num_cpu_devices", None, "Run on the CPU, as this many virtual devices.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool(
        "deterministic",
        False,
        "On a GPU, use only operations that give the same bits in every run (slower); CPU and TPU always do.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "compilation_cache",
        "~/.cache/t5x_like/jax",
        "Directory that keeps compiled programs, so that a second start compiles nothing; empty: none is kept.",
        flag_values=values,
    )
    flags.DEFINE_bool("print_config", False, "Print all values with their origins, and stop.", flag_values=values)
    flags.DEFINE_string("explain", None, "Explain a class, a Class.field or a macro, and stop.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this, and stop.", short_name="h", flag_values=values)


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    # absl knows no flags with a dot; as bindings they keep their order among themselves.
    plain = [f"--gin_bindings={arg.removeprefix('--gin.')}" if arg.startswith("--gin.") else arg for arg in argv]
    try:
        positional = values(["t5x_like", *plain])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(values), n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; --help lists all"
        raise UserError(f"there is no flag --{error.flagname}{hint}") from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    if positional:
        raise UserError(f"unexpected argument {positional[0]}: flags are written --name=value")


def _help(command: Callable[..., int | None], values: flags.FlagValues) -> str:
    lines = [command.__doc__ or "", "", "  --gin.NAME=VALUE: Bind a macro or a Class.field; may be given again."]
    for name in sorted(set(values) - {"flagfile", "undefok", "h"}):
        default = values[name].default
        lines.append(f"  --{name}: {values[name].help}" + (f" (default: {default})" if default else ""))
    return "\n".join(lines)


def _use_cpu_devices(count: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    if jax.config.jax_num_cpu_devices == count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise UserError(f"--num_cpu_devices={count} comes too late: JAX has already started in this process") from error


def _use_compilation_cache(directory: str) -> None:
    # JAX's own setting (JAX_COMPILATION_CACHE_DIR) has the last word.
    if directory and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))


def _import_plugin(module: str) -> None:
    if os.getcwd() not in sys.path:
        # `python -m t5x_like` looks there by itself, the console script does not.
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
    except UserError as error:
        raise UserError(f"--plugin={module}: {error}") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if frame.filename.startswith("<frozen") else f" ({frame.filename}:{frame.lineno})"
        raise UserError(f"--plugin={module} cannot be imported: {type(error).__name__}: {error}{where}") from error
