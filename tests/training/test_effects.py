import dataclasses
import gzip
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.models import block
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward import mlp
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.stack import PipelineConfig, StackConfig
from t5x_like.reporting.metrics import read_metrics
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training import loop
from t5x_like.training.effects import Effect, EffectConfig
from t5x_like.training.experiment import LoggingConfig
from t5x_like.training.inspect_layers import FindNonFinite
from t5x_like.training.job import set_up
from t5x_like.training.observe import Sample
from t5x_like.training.recovery import Fault
from tests import toy
from tests.training.test_loop import trace, train


@pytest.fixture
def directory(tmp_path):
    toy.write_text(tmp_path)
    return tmp_path


def logging(**changes) -> LoggingConfig:
    return LoggingConfig(**{"every_steps": 1, "tensorboard": False, "progress": False, "sample_tokens": 8, **changes})


@configurable
class FailingConfig(EffectConfig):
    def build(self, run, step):
        return FailingEffect()


class FailingEffect(Effect):
    def after_step(self, step, state, metrics):
        raise ValueError("a bug")


def test_the_written_order_is_the_order(directory, monkeypatch):
    written = re.findall(r"^    (\w+)  +\S", loop.__doc__, re.MULTILINE)
    given = []
    original = loop.Training.effects
    monkeypatch.setattr(loop.Training, "effects", lambda *args: given.extend(original(*args)) or tuple(given))
    logs = logging(profile_steps=(7, 8), sample_every_steps=7, norms_every_steps=7)
    train(toy.experiment(directory, steps=2, logging=logs, effects=(FailingConfig(),)), sample=str, debug_nans=True)
    names = {"FindNonFinite": "find"}
    assert written[:2] == ["fetch", "step"]
    assert [names.get(type(e).__name__, type(e).__name__.lower()) for e in given] == written[2:]


def test_an_effect_that_fails_is_counted_and_training_goes_on(directory):
    experiment = toy.experiment(directory, steps=3, effects=(FailingConfig(),))
    assert train(experiment).complete
    records = read_metrics(directory / "run" / "metrics.jsonl")
    # The evaluation of the last step writes its record, before the effect acts.
    assert [r["failed_FailingEffects"] for r in records if r["split"] == "train"] == [1, 2, 2]


@configurable
class EndingConfig(EffectConfig):
    def build(self, run, step):
        return EndingEffect(run.directory.rollbacks)


class EndingEffect(Effect):
    def __init__(self, rollbacks):
        self.rollbacks = rollbacks

    def after_step(self, step, state, metrics):
        if step == 2 and not self.rollbacks.exists():
            raise Fault(step, "the first try does not count")
        if step == 3:
            raise UserError("three steps are enough")


def test_an_effect_may_send_training_back_and_end_it(directory):
    with pytest.raises(UserError, match="three steps are enough"):
        train(toy.experiment(directory, effects=(EndingConfig(),)))
    (rollback,) = json.loads((directory / "run" / "rollbacks.json").read_text())
    assert rollback["reason"] == "at step 2, the first try does not count"


def test_a_trace_norms_and_samples_change_no_number(directory):
    plain = toy.experiment(directory, steps=5)
    train(plain)
    before = trace(plain)
    (directory / "run").rename(directory / "plain")
    logs = logging(profile_steps=(2, 3), norms_every_steps=2, sample_every_steps=2)
    experiment = toy.experiment(directory, steps=5, logging=logs)
    train(experiment, sample=lambda state: f"step {int(state.step)}")
    # The norms are part of the step's program, which may round otherwise.
    for ours, theirs in zip(trace(experiment), before, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-6)
        assert ours[3] == (theirs[3] and pytest.approx(theirs[3], rel=1e-6))

    files = list((directory / "run" / "profile").rglob("*.xplane.pb"))
    assert files
    events = gzip.decompress(next((directory / "run" / "profile").rglob("*.trace.json.gz")).read_bytes()).decode()
    steps = {event["args"]["step_num"] for event in json.loads(events)["traceEvents"] if event.get("name") == "train"}
    assert steps == {"2", "3"}

    samples = [json.loads(line) for line in (directory / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": 2, "text": "step 2"}, {"step": 4, "text": "step 4"}]

    records = read_metrics(directory / "run" / "metrics.jsonl")
    norms = {r["step"]: r for r in records if r["split"] == "norms"}
    gradients = {r["step"]: r["grad_norm"] for r in records if r["split"] == "train"}
    assert sorted(norms) == [2, 4]
    for step, values in norms.items():
        squares = [value**2 for name, value in values.items() if name.startswith("gradient/")]
        np.testing.assert_allclose(np.sqrt(sum(squares)), gradients[step], rtol=1e-5)
        assert all(values[f"activation/stack/{layer}/{part}"] > 0 for layer in (0, 1) for part in ("mixer", "output"))
        assert values["update/embedding"] > 0


def with_parameter(change):
    """`initial_state` with one array of the feed-forward network changed."""
    original = loop.initial_state

    def initial_state(*args):
        state = original(*args)
        chosen = lambda path: re.search("feedforward/(up|down)", jax.tree_util.keystr(path, simple=True, separator="/"))
        change_leaf = lambda path, x: change(x) if chosen(path) else x
        return state._replace(params=jax.tree.map_with_path(change_leaf, state.params))

    return initial_state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.at[1].set(jnp.inf), r"parameter stack/1/feedforward/down/kernel is not finite"),
        (lambda x: x.at[1].multiply(1e30), r"the feedforward of layer 1 of the stack is the first activation that is"),
    ],
    ids=["parameter", "activation"],
)
def test_debug_nans_names_the_layer(directory, monkeypatch, change, message):
    monkeypatch.setattr(loop, "initial_state", with_parameter(change))
    with pytest.raises(UserError, match=f"at step 1, {message}"):
        train(toy.experiment(directory), debug_nans=True)


def test_debug_nans_names_the_gradient_where_the_backward_pass_broke(directory, monkeypatch):
    # The root has no derivative at 0, where layer 1 alone has its hidden units; layer 0 catches the NaN from there.
    monkeypatch.setitem(mlp.ACTIVATIONS, "relu", lambda x: jnp.sqrt(jnp.abs(x)))
    monkeypatch.setattr(loop, "initial_state", with_parameter(lambda x: x.at[1].set(0)))
    feedforward = mlp.MLPConfig(d_ff=64, activation="relu", gated=False)
    layer = BlockConfig(mixer=AttentionConfig(num_heads=4), feedforward=feedforward)
    decoder = toy.model(stack=StackConfig(num_layers=3, block=layer))
    message = r"step 1, the forward pass is finite, but the gradient of stack/1/feedforward/up/kernel is"
    with pytest.raises(UserError, match=message):
        train(toy.experiment(directory, decoder=decoder), debug_nans=True)


def test_the_backward_pass_comes_by_the_decoder_first():
    layer = toy.model().stack.block
    layers = StackConfig(num_layers=4, block=(layer, layer), first=(layer,))
    job = SimpleNamespace(model=SimpleNamespace(stacks={"encoder": layers, "decoder": layers}))
    expected = [
        "head/kernel",
        "decoder/final_norm/scale",
        "decoder/3/mixer/out/kernel",
        "decoder/2/feedforward/up/kernel",
        "decoder/2/feedforward_norm/scale",
        "decoder/2/cross_attention/out/kernel",
        "decoder/2/mixer/out/kernel",
        "decoder/1/feedforward/up/kernel",
        "decoder/0/mixer/out/kernel",
        "decoder/position_bias/table",
        "encoder/final_norm/scale",
        "encoder/0/mixer/out/kernel",
        "embedding",
    ]
    find = FindNonFinite(SimpleNamespace(job=job))
    assert sorted(sorted(expected), key=find._backward) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile_steps": (0, 3)}, r"profile_steps is \(0, 3\): give the first and the last step, from 1 on"),
        ({"profile_steps": (5, 2)}, r"profile_steps is \(5, 2\)"),
        ({"norms_every_steps": -1}, "norms_every_steps is -1: it must not be negative"),
        ({"sample_every_steps": 5, "sample_tokens": 0}, "sample_tokens is 0: give samples a length"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        LoggingConfig(**settings)


def test_a_resumed_run_drops_samples_of_later_steps(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 2, "text": "a"}\n{"step": 4, "text": "b"}\n{"step": 6, "te')
    Sample(2, str, path, None, start_step=3)
    assert path.read_text() == '{"step": 2, "text": "a"}\n'


def norms(directory, name: str, mesh: MeshConfig, devices: int) -> list[dict]:
    stack = dataclasses.replace(toy.model().stack, pipeline=PipelineConfig(num_microbatches=2))
    options = {"steps": 2, "model_dir": str(directory / name), "logging": logging(norms_every_steps=1)}
    train(toy.experiment(directory, mesh=mesh, decoder=toy.model(stack=stack), **options), devices=devices)
    return [r for r in read_metrics(directory / name / "metrics.jsonl") if r["split"] == "norms"]


def test_norms_on_a_mesh_are_those_of_one_device(directory):
    expected = norms(directory, "one", MeshConfig(), 1)
    assert {key.split("/")[0] for key in expected[0]} >= {"activation", "gradient", "update"}
    for name, mesh in {"tensor": MeshConfig(data=2, tensor=2), "stage": MeshConfig(data=2, stage=2)}.items():
        for one, many in zip(expected, norms(directory, name, mesh, 4), strict=True):
            assert one.keys() == many.keys()
            keys = [key for key in one if "/" in key]
            np.testing.assert_allclose([many[key] for key in keys], [one[key] for key in keys], rtol=1e-3, atol=1e-6)


def test_what_is_off_is_not_in_the_program(directory, monkeypatch):
    job = set_up(toy.experiment(directory), build_mesh(MeshConfig(), jax.devices()[:1]), 257)

    def program() -> str:
        # Functions of its own: JAX remembers what it has traced.
        step = lambda *args: job.train_step(*args)
        with job.placement.use():
            return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(step)(job.state, job.batch)))

    off = program()
    with job.placement.use():
        assert "layer_norms" not in jax.eval_shape(job.train_step, job.state, job.batch)[1]
    monkeypatch.setattr(block, "seen", lambda part, x: x)
    assert program() == off
