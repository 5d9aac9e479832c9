import dataclasses
import itertools

import gin
import pytest

from t5x_like.config import ConfigError, parse_config


def test_builds_what_the_files_say(configure, toys):
    job = configure().build(toys.Job)
    assert job == toys.Job(net=toys.Net(num_layers=2, feedforward=toys.Mlp(width=8)), steps=100)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("Job.rate=1", "rate", 1.0),
        ("Job.rate=inf", "rate", float("inf")),
        ("Job.rate=-2e-3", "rate", -0.002),
        ("Job.speed=FAST", "speed", "FAST"),
        ("Job.speed=2", "speed", "FAST"),
        ("Job.model_dir=runs/a", "model_dir", "runs/a"),
        ("Job.model_dir='runs/a b'", "model_dir", "runs/a b"),
        ("Job.model_dir=2026", "model_dir", "2026"),
        ("Job.model_dir=2026-01-05", "model_dir", "2026-01-05"),
        ("Job.model_dir=true", "model_dir", "true"),
        ("Job.model_dir=", "model_dir", ""),
        ("Job.model_dir=a=b", "model_dir", "a=b"),
        ("Job.note=3", "note", 3),
        ("Job.note=None", "note", None),
        ("Job.steps=2*3", "steps", 6),
        ("STEPS=(1 + 2) * 3 ** 2 // 2", "steps", 13),
        ("STEPS=-2 ** 2 + 7 - 2 - 1", "steps", 0),
        ("STEPS=2 ** 3 ** 2", "steps", 512),
        ("STEPS=%LAYERS * -%LAYERS", "steps", -4),
        ("Job.rate=%STEPS / 8", "rate", 12.5),
    ],
)
def test_values_of_the_command_line(configure, toys, override, field, value):
    got = getattr(configure(override).build(toys.Job), field)
    assert (got.name if isinstance(got, toys.Speed) else got) == value
    assert type(got) in (type(value), toys.Speed)


@pytest.mark.parametrize(
    ("override", "files"),
    [("/data/*.txt", ("/data/*.txt",)), ("a.txt,b.txt", ("a.txt,b.txt",)), ("['a', 'b']", ("a", "b"))],
)
def test_a_string_is_a_tuple_of_one(configure, toys, override, files):
    assert configure(f"Source.files={override}").build(toys.Job).train.files == files


def test_arithmetic_in_a_file(configure, toys):
    config = configure(more="TENTH = %STEPS // 10  # of all\nSource.weights = [%TENTH / 4, (1 + 2) * 2, -(%TENTH)]")
    assert config.build(toys.Job).train.weights == (2.5, 6.0, -10.0)


def test_true_and_false_in_a_file(configure, toys):
    assert configure(more="Mlp.bias = true").build(toys.Job).net.feedforward.bias is True
    assert configure(more="Mlp:\n  bias = false\n  width = 3\n").build(toys.Job).net.feedforward == toys.Mlp(width=3)


def test_the_later_file_wins_and_the_command_line_over_all(configure, toys):
    files = {"one": "STEPS = 1\nMlp.width = 1", "two": "STEPS = 2\nMlp.width = 2"}
    job = configure("STEPS=3", **files).build(toys.Job)
    assert (job.steps, job.net.feedforward.width) == (3, 2)
    assert configure("STEPS=3", "STEPS=4").build(toys.Job).steps == 4


def test_bindings_reach_default_objects(configure, toys):
    net = configure(more="Norm.kind = 'layer'").build(toys.Job).net
    assert net.norm == toys.Norm(kind="layer", epsilon=1e-6)
    assert net.last_norm == toys.Norm(kind="layer", epsilon=0.5)


def test_a_reference_is_built_once_per_scope(configure, toys):
    scoped = "Job.train = @a/Source()\nJob.test = %TEST\nTEST = @a/Source()\na/Source.files = ['x']"
    job = configure(more=scoped).build(toys.Job)
    assert job.train is job.test


def test_scopes_agree_with_gin(configure, toys):
    """Every subset of these bindings gives what gin gives, references without a macro taken."""
    base = "Job.steps = 1\nJob.net = @outer/Net()\nJob.train = @a/b/Source()\nouter/Net.feedforward = @Mlp()\n"
    base += "outer/Net.last_norm = @inner/Norm()\nouter/Net.norm = @Norm()\nNet.num_layers = 1\nMlp.width = 1\n"
    extra = [
        "outer/Net.num_layers = 2",
        "outer/Mlp.width = 2",
        "Norm.epsilon = 2.0",
        "outer/Norm.epsilon = 3.0",
        "inner/Norm.kind = 'layer'",
        "Source.files = ('0',)",
        "a/Source.files = ('a',)",
        "a/b/Source.files = ('ab',)",
    ]
    plain = {cls: gin.external_configurable(getattr(toys, cls), cls) for cls in ("Net", "Mlp", "Norm", "Source", "Job")}
    try:
        for bits in itertools.product((False, True), repeat=len(extra)):
            text = base + "\n".join(itertools.compress(extra, bits))
            gin.clear_config()
            gin.parse_config(text)
            assert configure(base=text).build(toys.Job) == plain["Job"](), text
    finally:
        gin.clear_config(clear_constants=True)


def test_what_an_overridden_binding_used_is_no_mistake(configure, toys):
    swapped = "Net.feedforward = @Experts()\nExperts.width = 3"
    assert configure(more=swapped).build(toys.Job).net.feedforward == toys.Experts(width=3)
    assert configure("Net.num_layers=5").build(toys.Job).net.num_layers == 5


MESSAGES = {
    "misspelt macro": (
        ["LAYER=3"],
        "",
        "LAYER (command line) is never used; did you mean LAYERS?",
    ),
    "unused scope": (
        [],
        "train/Job.steps = 7",
        "train/Job.steps (more.gin:1) is never used: this run builds Job without a scope",
    ),
    "unused scope, others exist": (
        [],
        "Job.train = @a/Source()\nJob.test = @b/c/Source()\nc/Source.files = 'x'",
        "c/Source.files (more.gin:3) is never used: this run builds Source in scope a, in scope b/c",
    ),
    "hidden by a scope": (
        ["Source.files=x"],
        "Job.train = @a/Source()\na/Source.files = 'y'",
        "Source.files (command line) is never used: a/Source.files (more.gin:2) overrides it",
    ),
    "a part that is not chosen": (
        ["Experts.width=3"],
        "",
        "Experts.width (command line) is never used: this run has no Experts; "
        "Net.feedforward = @Experts() would build one",
    ),
    "set after it was swapped out": (
        [],
        "Experts.width = 3\nNet.feedforward = @Experts()\nMlp.width = 5",
        "Mlp.width (more.gin:3) is never used: this run has no Mlp; Net.feedforward = @Mlp() would build one",
    ),
    "string for int": (
        [],
        "LAYERS = '3'",
        "Net.num_layers must be int, got '3' (base.gin:5, LAYERS from more.gin:1)",
    ),
    "float for int": (
        ["STEPS=1e-3.0"],
        "",
        "Job.steps must be int, got '1e-3.0' (base.gin:9, STEPS from command line)",
    ),
    "bool for int": (["Job.steps=True"], "", "Job.steps must be int, got True (command line)"),
    "word for bool": (["Mlp.bias=yes"], "", "Mlp.bias must be bool (true or false), got 'yes' (command line)"),
    "Literal": (
        ["Norm.kind=RMS"],
        "",
        "Norm.kind must be 'rms' or 'layer', got 'RMS' (command line); did you mean 'rms'?",
    ),
    "Enum": (
        [],
        "Job.speed = 'FASTER'",
        "Job.speed must be 'SLOW' or 'FAST', got 'FASTER' (more.gin:1); did you mean 'FAST'?",
    ),
    "Optional is checked in files": ([], "Job.test = 'x'", "Job.test must be Source or None, got 'x' (more.gin:1)"),
    "tuple": ([], "Source.weights = (1, 'a')", "Source.weights must be tuple of float, got (1, 'a') (more.gin:1)"),
    "string for a file's str": ([], "Job.model_dir = 2026", "Job.model_dir must be str, got 2026 (more.gin:1)"),
    "class without ()": ([], "Job.net = @Net", "Job.net must be Net, got @Net (more.gin:1); add () to build it"),
    "wrong class": ([], "Job.net = @Norm()", "Job.net must be Net, got @Norm() (more.gin:1)"),
    "misspelt class": (
        [],
        "Nett.num_layers = 3",
        "Nett.num_layers (more.gin:1): there is no class Nett; did you mean Net?",
    ),
    "class with its module": (
        ["lib.Nrom.epsilon=3"],
        "",
        "lib.Nrom.epsilon (command line): there is no class lib.Nrom; did you mean Norm?",
    ),
    "misspelt reference": (
        [],
        "Job.test = @Sorce()",
        "Job.test (more.gin:1): there is no class Sorce; did you mean Source?",
    ),
    "misspelt field": (
        [],
        "Net.num_layer = 3",
        "Net.num_layer (more.gin:1): Net has no field num_layer; did you mean num_layers (int, required)?",
    ),
    "misspelt field with a default": (
        [],
        "Net.last_nrm = @Norm()",
        "Net.last_nrm (more.gin:1): Net has no field last_nrm; did you mean last_norm (Norm, default @Norm())?",
    ),
    "field without its class": (
        ["num_layers=3"],
        "",
        "num_layers (command line): neither a macro, in capitals, nor Class.field; did you mean Net.num_layers?",
    ),
    "misspelt use of a macro": (
        [],
        "Job.net = %NEET",
        "Job.net (more.gin:1): macro NEET is not defined; did you mean NET?",
    ),
    "required value set before": (
        [],
        "STEPS = %gin.REQUIRED",
        "1 value is missing:\n"
        "    STEPS: pass --gin.STEPS=... (declared at more.gin:1, after base.gin:3 set it: the later file wins)",
    ),
    "a constructor refuses": (
        ["LAYERS=0"],
        "",
        "Net.num_layers is 0: it must be at least 1.\n"
        "    while building Job.net, a Net\n"
        "    with num_layers = 0 (base.gin:5)\n"
        "    with feedforward = @Mlp() (base.gin:6)",
    ),
    "macros in a circle": (
        [],
        "STEPS = %LAYERS\nLAYERS = %STEPS",
        "macros refer to each other: LAYERS -> STEPS -> LAYERS",
    ),
    "arithmetic on strings": (
        ["STEPS=%NAME * 2", "NAME=abc"],
        "",
        "STEPS (command line): cannot compute 'abc' * 2: arithmetic is for numbers",
    ),
    "division by zero": (
        ["STEPS=1//0"],
        "",
        "STEPS (command line): cannot compute 1 // 0: integer division or modulo by zero",
    ),
    "number without end": (
        ["STEPS=%A**99", "A=%B**99", "B=9**99"],
        "",
        "STEPS (command line): cannot compute a number of 31069 bits ** 99: numbers are at most 1000 bits long",
    ),
    "endless power": (
        ["STEPS=9**9**9"],
        "",
        "STEPS (command line): cannot compute 9 ** 387420489: an exponent is at most 100",
    ),
}


@pytest.mark.parametrize("row", MESSAGES)
def test_message(configure, toys, row):
    overrides, more, message = MESSAGES[row]
    with pytest.raises(ConfigError) as caught:
        configure(*overrides, more=more).build(toys.Job)
    assert str(caught.value) == message


def test_all_missing_values_in_one_message(configure, toys):
    base = "NAME = %gin.REQUIRED\nSIZE = %gin.REQUIRED\nJob.model_dir = %NAME\nMlp.width = %SIZE\nJob.net = @Net()"
    with pytest.raises(ConfigError) as caught:
        configure(base=base).build(toys.Job)
    assert str(caught.value) == (
        "5 values are missing:\n"
        "    Net.num_layers: pass --gin.Net.num_layers=... (int; for Job.net.num_layers)\n"
        "    Net.feedforward: pass --gin.Net.feedforward=... (Mlp or Experts; for Job.net.feedforward)\n"
        "    Job.steps: pass --gin.Job.steps=... (int; for Job.steps)\n"
        "    NAME: pass --gin.NAME=... (declared at base.gin:1)\n"
        "    SIZE: pass --gin.SIZE=... (declared at base.gin:2)"
    )


def test_all_problems_in_one_message(configure, toys):
    with pytest.raises(ConfigError) as caught:
        configure("LAYER=3", "Mlp.width=a", more="STEPS = %gin.REQUIRED").build(toys.Job)
    assert str(caught.value).splitlines()[:3] == [
        "the configuration has 3 problems:",
        "1. Mlp.width must be int, got 'a' (command line)",
        "2. 1 value is missing:",
    ]
    assert str(caught.value).endswith("\n3. LAYER (command line) is never used; did you mean LAYERS?")


def test_the_cause_of_a_refusal_is_kept(configure, toys):
    with pytest.raises(ConfigError) as caught:
        configure("LAYERS=0").build(toys.Job)
    assert "at least 1" in str(caught.value.__cause__)


def test_an_object_inside_itself(configure, toys, monkeypatch):
    from t5x_like.configurable import REGISTRY, configurable

    @configurable
    class Loop:
        """A loop.

        Attributes:
          inner: another.
        """

        inner: "Loop | None" = None

    Loop.__annotations__["inner"] = Loop | None
    monkeypatch.delitem(REGISTRY, "Loop", raising=False)
    monkeypatch.setitem(REGISTRY, "Loop", Loop)
    with pytest.raises(ConfigError, match=r"Loop.inner: @Loop\(\) would stand inside itself, at Loop"):
        parse_config([], ["Loop.inner=@Loop()"]).build(Loop)


def test_objects_are_equal_to_python_ones(configure, toys):
    """The resolver adds nothing to an object: replacing a field gives what a binding gives."""
    job = configure().build(toys.Job)
    assert configure("Job.rate=2").build(toys.Job) == dataclasses.replace(job, rate=2.0)
