import gzip
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.reporting.metrics import read_metrics
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training import loop
from t5x_like.training.effects import Effect, EffectConfig
from t5x_like.training.experiment import LoggingConfig
from t5x_like.training.inspect_layers import FindNonFinite
from t5x_like.training.job import set_up
from t5x_like.training.observe import Sample
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
    original = loop.effects_of
    monkeypatch.setattr(loop, "effects_of", lambda *args: given.extend(original(*args)) or tuple(given))
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


def test_a_trace_norms_and_samples_change_no_number(directory):
    plain = toy.experiment(directory, steps=5)
    train(plain)
    before = trace(plain)
    (directory / "run").rename(directory / "plain")
    logs = logging(profile_steps=(2, 3), norms_every_steps=2, sample_every_steps=2)
    experiment = toy.experiment(directory, steps=5, logging=logs)
    train(experiment, sample=lambda state: f"step {int(state.step)}")
    assert trace(experiment) == before

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
        (lambda x: x.at[1].set(jnp.inf), r"parameter stack/scanned/0/feedforward/down/kernel\[1\] is not finite"),
        (lambda x: x.at[1].multiply(1e30), r"the feedforward of layer 1 of the stack is the first activation that is"),
    ],
    ids=["parameter", "activation"],
)
def test_debug_nans_names_the_layer(directory, monkeypatch, change, message):
    monkeypatch.setattr(loop, "initial_state", with_parameter(change))
    with pytest.raises(UserError, match=f"at step 1, {message}"):
        train(toy.experiment(directory), debug_nans=True)


def test_debug_nans_names_a_gradient():
    class FiniteForward:
        def activations(self, step, params):
            return {("stack", 0, "mixer"): 1.0}, 2.0

        def gradient(self, step, params):
            return {"stack": {"kernel": jnp.ones((3, 2)).at[1, 0].set(jnp.nan)}}

    axes = {"stack": {"kernel": ("layers", "embed")}}
    with jax.set_mesh(build_mesh(MeshConfig(), jax.devices()[:1])):
        cause = FindNonFinite(FiniteForward(), axes).cause(4, {"stack": {"kernel": jnp.ones((3, 2))}})
    assert cause == "the forward pass is finite, but the gradient of stack/kernel[1] is not"


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
    Sample(2, str, path, None, None, start_step=3)
    assert path.read_text() == '{"step": 2, "text": "a"}\n'


def test_norms_on_a_mesh_are_those_of_one_device(directory):
    found = {}
    for name, mesh, devices in (("one", MeshConfig(), 1), ("many", MeshConfig(data=1, stage=2), 2)):
        run = directory / name
        logs = logging(norms_every_steps=1)
        train(toy.experiment(directory, mesh=mesh, model_dir=str(run), steps=2, logging=logs), devices=devices)
        found[name] = [r for r in read_metrics(run / "metrics.jsonl") if r["split"] == "norms"]
    for one, many in zip(found["one"], found["many"], strict=True):
        assert one.keys() == many.keys()
        exact = [key for key in one if key.startswith(("gradient/", "update/"))]
        np.testing.assert_allclose([many[key] for key in exact], [one[key] for key in exact], rtol=1e-3, atol=1e-6)


def test_what_is_off_is_not_in_the_program(directory):
    experiment = toy.experiment(directory)
    job = set_up(experiment, build_mesh(MeshConfig(), jax.devices()[:1]), 257)
    with job.placement.use():
        jaxpr = jax.make_jaxpr(job.train_step)(job.state, job.batch)
        metrics = jax.eval_shape(job.train_step, job.state, job.batch)[1]
    assert "debug_callback" not in str(jaxpr)
    assert "layer_norms" not in metrics
