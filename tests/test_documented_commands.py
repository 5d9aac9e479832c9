"""The commands that README and docs show: their flags exist, their files exist, their configurations resolve."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from t5x_like.commands.main import COMMANDS, main
from t5x_like.config.parse import read_bindings
from t5x_like.configurable import REGISTRY

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

WITH_CONFIGURATION = ("train", "plan", "prepare", "inspect-data")
"""Commands whose configuration stands in the command, rather than in the directory of a run."""

TAKE_TRAIN_FLAGS = {"scripts/quickstart.sh": ["--gin_file=runs/quickstart.gin"], "scripts/slurm/train.sbatch": []}
"""Scripts whose arguments go to `t5x_like train`, behind these of their own; with others they follow `--`."""

CUT_STEPS = 12


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def lines(page: Path) -> list[str]:
    """The lines of a page's bash blocks; one that ends in a backslash goes on in the next."""
    return [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def script_of(arguments: Sequence[str]) -> tuple[str, list[str]] | None:
    """The first script of the repository that a command names, and what follows it."""
    for index, word in enumerate(arguments):
        if word.startswith("scripts/"):
            return word, list(arguments[index + 1 :])
    return None


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each `t5x_like` command with the page that shows it, those that scripts start included."""
    for page in PAGES:
        for line in lines(page):
            arguments = words(line)
            if arguments[:1] == ["t5x_like"]:
                yield page.name, arguments[1:]
            elif script := script_of(arguments):
                name, rest = script
                handed_on = rest[rest.index("--") + 1 :] if "--" in rest else []
                if name in TAKE_TRAIN_FLAGS:
                    yield page.name, ["train", *TAKE_TRAIN_FLAGS[name], *rest]
                elif handed_on:
                    yield page.name, handed_on if handed_on[0] in COMMANDS else ["train", *handed_on]


SHOWN = list(commands())
NAMES = [f"{page}-{number}-{arguments[0]}" for number, (page, arguments) in enumerate(SHOWN)]


def flag_values(arguments: Sequence[str], name: str) -> list[str]:
    return [word.partition("=")[2] for word in arguments if word.startswith(f"--{name}=")]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory with the modules that the pages tell readers to write; what they register is forgotten."""
    for page in PAGES:
        for block in blocks(page, "python"):
            if name := re.match(r"# (\w+)\.py\b", block):
                (tmp_path / f"{name[1]}.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    registered, imported = set(REGISTRY), set(sys.modules)
    yield tmp_path
    for name in set(REGISTRY) - registered:
        if (module := sys.modules.get(REGISTRY[name].__module__)) and str(module.__file__).startswith(str(tmp_path)):
            del REGISTRY[name]
    for name in set(sys.modules) - imported:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_pages_show_commands():
    assert {arguments[0] for _, arguments in SHOWN} == set(COMMANDS)


@pytest.mark.parametrize(("page", "arguments"), SHOWN, ids=NAMES)
def test_a_documented_command_has_known_flags_and_resolves(page, arguments, elsewhere, capsys):
    verb, *flags = arguments
    assert verb in COMMANDS, f"{page}: there is no command {verb}"
    assert main([verb, *flags, "--help"]) == 0, f"{page}: {capsys.readouterr().err}"
    read_bindings(flag_values(flags, "gin_file"), [])
    if verb in WITH_CONFIGURATION:
        # The devices of this process are chosen already.
        flags = [flag for flag in flags if not flag.startswith("--num_cpu_devices")]
        assert main([verb, *flags, "--print_config"]) == 0, f"{page}: {capsys.readouterr().err}"


def test_scripts_that_pages_name_exist_and_know_their_flags():
    seen = set()
    for page in PAGES:
        for line in lines(page):
            if (script := script_of(words(line))) is None:
                continue
            name, rest = script
            assert (ROOT / name).is_file(), f"{page.name}: there is no {name}"
            seen.add(name)
            if name in TAKE_TRAIN_FLAGS:
                continue
            text = (ROOT / name).read_text()
            own = rest[: rest.index("--")] if "--" in rest else rest
            for flag in (word[2:].partition("=")[0] for word in own if word.startswith("--")):
                assert re.search(rf"--{flag}\b|DEFINE_\w+\(\s*\"{flag}\"", text), f"{page.name}: {name} has no --{flag}"
    assert {"scripts/launch_local.py", "scripts/tpu/launch.sh", "scripts/quickstart.sh"} <= seen


def shortened(line: str) -> str:
    """The line with few training steps, and a plan without the compiler."""
    command, comment, rest = line.partition(" #")
    if " train " in f"{command} ":
        command = re.sub(r"--gin\.STEPS=\d+", "", command.rstrip())
        command += f" --gin.STEPS={CUT_STEPS} --gin.WARMUP_STEPS=2"
    elif command.startswith("t5x_like plan "):
        command += " --analytical"
    return command + comment + rest


@pytest.mark.slow
def test_readme_can_be_followed(tmp_path):
    """Every command of README in order, in a copy of the repository; only steps are fewer."""
    copy, bin_directory = tmp_path / "copy", tmp_path / "bin"
    for name in ("t5x_like", "gin_configs", "docs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    bin_directory.mkdir()
    for name, command in {"t5x_like": f"{sys.executable} -m t5x_like", "python": sys.executable}.items():
        (bin_directory / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (bin_directory / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_directory}:{os.environ['PATH']}", "PYTHONPATH": str(copy)}
    for line in lines(ROOT / "README.md"):
        if line.startswith("bash scripts/"):  # They install the package.
            continue
        done = subprocess.run(
            ["bash", "-c", shortened(line)], cwd=copy, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
