import sys

import jax
import pytest
from absl import flags

import t5x_like
from t5x_like.commands.cli import configured, run
from t5x_like.commands.main import main
from t5x_like.configurable import REGISTRY, configurable
from t5x_like.errors import UserError


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    """A small run as tiny.gin in the working directory; its class alone is registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    registered = dict(REGISTRY)
    REGISTRY.clear()

    @configurable
    class Tiny:
        """A run.

        Attributes:
          steps: how long.
          model_dir: where.
        """

        steps: int
        model_dir: str = ""

    (tmp_path / "tiny.gin").write_text("STEPS = 3\nTiny.steps = %STEPS\n")
    yield Tiny
    REGISTRY.clear()
    REGISTRY.update(registered)


@pytest.fixture
def train(experiment):
    """Returns train(*argv): the exit code and the run that was built."""

    def call(*argv):
        built = []

        def command(values):
            """Trains a tiny model."""
            if (got := configured(values, experiment)) is not None:
                built.append(got[1])

        return run(command, argv), (built or [None])[0]

    return call


def test_gin_flags(train, experiment):
    assert train("--gin_file=tiny.gin") == (0, experiment(steps=3))
    assert train("--gin_file=tiny.gin", "--gin.STEPS=7", "--gin.Tiny.model_dir=runs/a") == (
        0,
        experiment(steps=7, model_dir="runs/a"),
    )
    assert train("--gin_file", "tiny.gin", "--gin_bindings=STEPS=7", "--gin.STEPS=8") == (0, experiment(steps=8))


def test_gin_search_paths(train, experiment, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "tiny.gin").rename(tmp_path / "a/moved.gin")
    assert train("--gin_file=moved.gin", "--gin_search_paths=b,a") == (0, experiment(steps=3))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gin_fil=tiny.gin"], "error: there is no flag --gin_fil; did you mean --gin_file?\n"),
        (["--zzz"], "error: there is no flag --zzz; --help lists all\n"),
        (["tiny.gin"], "error: unexpected argument tiny.gin: flags are written --name=value\n"),
        (["--gin_file"], "error: Missing value for flag --gin_file\n"),
        (["--gin_file=tiny.gin", "--gin.STEP=3"], "error: STEP (command line) is never used; did you mean STEPS?\n"),
        (["--gin_file=tiny.gin", "--gin.STEPS"], "error: command line: STEPS is not of the form NAME=VALUE\n"),
        (["--gin_file=tiny.gin", "--plugin=no.such"], "error: --plugin=no.such cannot be imported: "),
        ([], "error: no configuration: pass --gin_file=FILE; shipped are "),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(train, capsys, argv, message):
    assert train(*argv) == (2, None)
    output = capsys.readouterr()
    assert output.err.startswith(message)
    assert (output.err.count("\n"), output.out) == (1, "")


def test_print_config(train, capsys):
    assert train("--gin_file=tiny.gin", "--print_config") == (0, None)
    assert capsys.readouterr().out == "@Tiny()\n  steps = 3       # STEPS, tiny.gin:1\n  model_dir = ''  # default\n"


def test_explain_needs_no_file(train, capsys):
    assert train("--explain=Tiny.steps") == (0, None)
    assert "Tiny.steps: int\n    how long.\n    required\n" in capsys.readouterr().out


def test_help(train, capsys):
    assert train("--help") == (0, None)
    output = capsys.readouterr().out
    assert output.startswith("Trains a tiny model.\n")
    assert "--num_cpu_devices: Run on the CPU, as this many virtual devices.\n" in output


def test_a_plugin_registers_classes(train, tmp_path, capsys):
    (tmp_path / "my_parts.py").write_text(
        "from t5x_like.configurable import configurable\n\n@configurable\nclass MyPart:\n    size: int = 1\n"
    )
    assert train("--plugin=my_parts", "--explain=MyPart.size") == (0, None)
    assert "default: 1" in capsys.readouterr().out
    (tmp_path / "broken.py").write_text("\n1 / 0\n")
    assert train("--plugin=broken") == (2, None)
    assert capsys.readouterr().err == (
        f"error: --plugin=broken cannot be imported: ZeroDivisionError: division by zero ({tmp_path}/broken.py:2)\n"
    )


def test_a_command_has_its_own_flags_and_exit_code():
    def define(values):
        flags.DEFINE_integer("code", 0, "The exit code.", flag_values=values)

    assert run(lambda values: values.code, ["--code=3"], define) == 3
    assert run(lambda values: values.code, [], define) == 0
    assert run(lambda values: values.code, ["--code=x"], define) == 2


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"t5x_like {t5x_like.__version__}\n"


def test_exceptions():
    def raising(error):
        def command(values):
            raise error

        return command

    assert run(raising(UserError("no")), []) == 2
    assert run(raising(KeyboardInterrupt()), []) == 130
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), [])


def test_num_cpu_devices(capsys):
    assert jax.device_count() == 8
    assert run(lambda values: None, ["--num_cpu_devices=8"]) == 0
    assert run(lambda values: None, ["--num_cpu_devices=4"]) == 2
    assert capsys.readouterr().err == (
        "error: --num_cpu_devices=4 comes too late: JAX has already started in this process\n"
    )
    assert run(lambda values: None, ["--num_cpu_devices=0"]) == 2
