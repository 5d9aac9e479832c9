import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from t5x_like.config import config_text, operative_config_text, parse_config, save_run_config
from t5x_like.configurable import REGISTRY, configurable, difference, to_dict
from t5x_like.errors import UserError

SCOPED = """
NAME = %gin.REQUIRED
HALF = %STEPS // 2
Job.model_dir = %NAME
Job.speed = 'FAST'
Job.train = @train/Source()
Job.test = @test/Source()
Source.weights = [1, %HALF]
train/Source.files = ['a', '%NAME']
test/Source.weights = ()
Norm.kind = 'layer'
"""


@pytest.mark.parametrize("overrides", [["NAME=runs/a"], ["NAME=2026", "Job.rate=inf", "Job.note='x'"]])
def test_the_saved_file_rebuilds_the_run(configure, toys, tmp_path, overrides):
    config = configure(*overrides, more=SCOPED)
    job = config.build(toys.Job)
    text = operative_config_text(config, toys.Job)
    (tmp_path / "saved.gin").write_text(text)
    again = parse_config(["saved.gin"])
    assert again.build(toys.Job) == job
    assert operative_config_text(again, toys.Job) == text


def test_macros_of_the_saved_file_still_work(configure, toys, tmp_path):
    (tmp_path / "saved.gin").write_text(operative_config_text(configure("NAME=a", more=SCOPED), toys.Job))
    job = parse_config(["saved.gin"], ["STEPS=10", "NAME=b"]).build(toys.Job)
    assert (job.steps, job.train.weights, job.model_dir) == (10, (1.0, 5.0), "b")


def test_text(configure, toys):
    assert operative_config_text(configure(), toys.Job) == (
        "# Everything this run uses, defaults included; give this file as --gin_file to build the same run.\n"
        """
LAYERS = 2
STEPS = 100

Job.net = @Net()
Job.steps = %STEPS
Job.model_dir = 'runs/default'
Job.train = @Source()
Job.test = None
Job.rate = 0.1
Job.speed = 'SLOW'
Job.note = None

Net.num_layers = %LAYERS
Net.feedforward = @Mlp()
Net.norm = @Norm()
Net.last_norm = @Job_net_last_norm/Norm()

Mlp.width = 8
Mlp.bias = False

Norm.kind = 'rms'
Norm.epsilon = 1e-06

Job_net_last_norm/Norm.kind = 'rms'
Job_net_last_norm/Norm.epsilon = 0.5

Source.files = ()
Source.weights = ()
"""
    )


def test_difference(configure, toys):
    old = to_dict(configure().build(toys.Job))
    new = to_dict(
        configure("STEPS=7", "Source.files=a", more="Net.feedforward = @Experts()\nExperts.width = 8").build(toys.Job)
    )
    assert difference(old, old) == []
    assert difference(json.loads(json.dumps(old)), new) == [
        'net.feedforward.class: "Mlp" -> "Experts"',
        "net.feedforward.bias: false -> null",
        "steps: 100 -> 7",
        'train.files: [] -> ["a"]',
    ]
    tested = to_dict(configure(more="Job.test = @Source()").build(toys.Job))
    assert difference(old, tested) == ["test: null -> Source"]


def test_run_directory(configure, toys, tmp_path):
    config = configure("STEPS=7")
    job = config.build(toys.Job)
    save_run_config(tmp_path / "runs/a", config, job)
    save_run_config(tmp_path / "runs/a", config, job)
    assert {path.name for path in (tmp_path / "runs/a").iterdir()} == {"operative_config.gin", "config.json"}
    assert parse_config([str(tmp_path / "runs/a/operative_config.gin")]).build(toys.Job) == job
    saved = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert saved["experiment"] == to_dict(job)
    assert (saved["gin_files"], saved["gin_bindings"]) == (["base.gin"], ["STEPS=7"])
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["devices"] == {"kind": "cpu", "count": 8, "hosts": 1}
    assert saved["argv"] == sys.argv


def test_git_revision():
    from t5x_like.config import save

    revision = save._git_revision()
    checkout = save.Path(save.t5x_like.__file__).parent.parent
    known = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert revision is None or revision.removesuffix("-dirty") == known


def test_an_unwritable_directory(configure, toys, tmp_path):
    config = configure()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written"):
        save_run_config(tmp_path / "file" / "run", config, config.build(toys.Job))


def objects(toys):
    net = toys.Net(num_layers=2, feedforward=toys.Experts(width=3))
    plain = toys.Job(net=net, steps=1)
    last = toys.Job(net=dataclasses.replace(net, last_norm=toys.Norm()), steps=1)
    both = dataclasses.replace(net, norm=toys.Norm(epsilon=0.1), last_norm=toys.Norm(epsilon=0.1))
    named = toys.Job(net=both, steps=1, model_dir="it's", speed=toys.Speed.FAST, train=toys.Source(files=("a",)))
    return plain, last, named


@pytest.mark.parametrize("number", range(3))
def test_the_file_of_an_object_rebuilds_it(number, toys, tmp_path, monkeypatch):
    job = objects(toys)[number]
    (tmp_path / "job.gin").write_text(config_text("JOB", job) + "Root.job = %JOB\n")
    monkeypatch.setitem(REGISTRY, "Root", Root := dataclasses.make_dataclass("Root", [("job", toys.Job)]))
    assert parse_config([str(tmp_path / "job.gin")]).build(Root).job == job


def test_the_file_of_an_object_is_short(toys):
    assert config_text("JOB", objects(toys)[2]) == (
        """JOB = @Job()

Job.net = @Net()
Job.steps = 1
Job.model_dir = "it's"
Job.train = @Source()
Job.speed = 'FAST'

Net.num_layers = 2
Net.feedforward = @Experts()
Net.norm = @Norm()
Net.last_norm = @Norm()

Experts.width = 3

Norm.epsilon = 0.1

Source.files = ('a',)
"""
    )
    assert "Net.last_norm = @net_last_norm/Norm()" in config_text("JOB", objects(toys)[0])


def test_unlike_objects_in_a_tuple_keep_their_fields(toys, tmp_path, monkeypatch):
    unlike = (toys.Norm(epsilon=0.1), toys.Norm(kind="layer"), toys.Norm(epsilon=0.1), toys.Norm(epsilon=0.2))

    @configurable
    class Stack:
        norms: tuple[toys.Norm, ...] = unlike

    monkeypatch.setitem(REGISTRY, "Stack", Stack)
    (tmp_path / "saved.gin").write_text(operative_config_text(parse_config([]), Stack))
    assert parse_config([str(tmp_path / "saved.gin")]).build(Stack) == Stack()

    text = config_text("STACK", stack := Stack(norms=unlike[1:]))
    assert "Stack.norms = (@Norm(), @norms/Norm(), @norms1/Norm())" in text
    (tmp_path / "stack.gin").write_text(text + "Root.stack = %STACK\n")
    monkeypatch.setitem(REGISTRY, "Root", Root := dataclasses.make_dataclass("Root", [("stack", Stack)]))
    assert parse_config([str(tmp_path / "stack.gin")]).build(Root).stack == stack
