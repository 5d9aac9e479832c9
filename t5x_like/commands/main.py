"""The command line: `t5x_like COMMAND --flag=value ...`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from t5x_like import __version__

COMMANDS = {
    "train": "train a model, or resume its training",
    "evaluate": "score a trained model on its validation split",
    "generate": "continue prompts with a trained model",
    "prepare": "make a corpus to train from: clean, deduplicate, tokenise",
    "inspect-data": "show what a model sees at a step, token by token",
    "plan": "what a run would take on a TPU pod or GPUs: memory, time, cost",
    "convert": "import a model from Hugging Face's format, or export one",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 after a mistake of the user, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        print(f"t5x_like {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    # Imported when chosen: each command loads no more than it needs.
    return importlib.import_module(f"t5x_like.commands.{name.replace('-', '_')}").main(rest)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    lines = [
        "usage: t5x_like COMMAND [--flag=value ...] | --version",
        "",
        *lines,
        "",
        "t5x_like COMMAND --help: its flags",
    ]
    return "\n".join(lines)
