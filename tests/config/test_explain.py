import pytest

from t5x_like.config import ConfigError, explain, field_docs, parse_config, print_config


def test_print_config(configure, toys):
    lines = print_config(configure("Job.rate=2", "STEPS=7"), toys.Job).splitlines()
    assert lines[0] == "@Job()"
    assert [[part.strip() for part in line.split("#")] for line in lines[1:8]] == [
        ["net = @Net()", "NET, base.gin:4"],
        ["num_layers = 2", "LAYERS, base.gin:2"],
        ["feedforward = @Mlp()", "base.gin:6"],
        ["width = 8", "base.gin:7"],
        ["bias = False", "default"],
        ["norm = @Norm()", "default"],
        ["kind = 'rms'", "default"],
    ]
    assert [len(line) - len(line.lstrip()) for line in lines[1:8]] == [2, 4, 4, 6, 6, 4, 6]
    assert "  steps = 7                   # STEPS, command line" in lines


def test_explain_a_field(configure, toys):
    assert explain(configure("Norm.kind=layer"), toys.Job, "Norm.epsilon") == (
        "Norm.epsilon: float\n"
        "    added to the variance; it keeps the division finite.\n"
        "    default: 1e-06\n"
        "    Job.net.norm.epsilon = 1e-06 (default)\n"
        "    Job.net.last_norm.epsilon = 0.5 (default)"
    )
    assert explain(configure("Norm.kind=layer"), toys.Job, "Norm.kind").splitlines()[-1] == (
        "    Job.net.last_norm.kind = 'layer' (command line)"
    )


def test_explain_a_class(configure, toys):
    assert explain(configure(), toys.Job, "Experts") == (
        "Experts: A mixture of experts.\n"
        "Experts.width: int\n"
        "    inner width of each.\n"
        "    required\n"
        "    this run has no Experts"
    )


def test_explain_a_macro(configure, toys):
    config = configure("STEPS=7", more="LAYERS = %STEPS // 2")
    assert explain(config, toys.Job, "STEPS") == (
        "STEPS = 7 (command line)\n    overrides 100 (base.gin:3)\n    used by LAYERS, Job.steps"
    )


def test_explain_where_the_configuration_does_not_build(configure, toys):
    text = explain(configure("STEPS=x"), toys.Job, "Mlp.width")
    assert "inner width" in text
    assert text.endswith(
        "(values are left out: this configuration does not build: "
        "Job.steps must be int, got 'x' (base.gin:9, STEPS from command line))"
    )


def test_explain_without_a_configuration(toys):
    assert explain(parse_config([]), toys.Job, "Mlp.width") == "Mlp.width: int\n    inner width.\n    required"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Net.num_layer", "Net has no field num_layer; did you mean num_layers (int, required)?"),
        ("Nett.num_layers", "there is no class Nett; did you mean Net?"),
        ("STEP", "there is no class or macro STEP; did you mean STEPS?"),
    ],
)
def test_explain_an_unknown_name(configure, toys, name, message):
    with pytest.raises(ConfigError) as caught:
        explain(configure(), toys.Job, name)
    assert str(caught.value) == f"--explain={name}: {message}"


def test_field_docs_join_lines_and_end_with_the_section():
    class Documented:
        """A class.

        Attributes:
          one: first
            and more: of it.
          two: second.

        Raises:
          three: not a field.
        """

    assert field_docs(Documented) == {"one": "first and more: of it.", "two": "second."}
