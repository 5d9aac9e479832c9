"""Runs whose layers are scanned, unrolled or grouped otherwise from one start to the next."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from t5x_like.checkpoints.layers import by_name, relaid
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands.train import forbidden_changes
from t5x_like.configurable import to_dict
from t5x_like.data.objectives.corruption import SpanCorruption
from t5x_like.errors import UserError
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.stack import PipelineConfig
from t5x_like.models.transformer import EncoderDecoderConfig
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training import loop
from t5x_like.training.initialize import InitialCheckpointConfig, with_parameters_of
from t5x_like.training.job import set_up
from t5x_like.training.optimizers import AdafactorConfig, AdamWConfig, MuonConfig
from t5x_like.training.state import initial_state
from tests import toy
from tests.training.test_loop import trace, train

STEPS, CHANGES_AT = 5, 3
BLOCK = toy.model().stack.block
GROUPINGS = {
    "scanned": {},
    "unrolled": {"scan_layers": False},
    "cycle of two": {"block": (BLOCK, BLOCK)},
    "first and a rest": {"first": (BLOCK,), "block": (BLOCK, BLOCK)},
}
ALGORITHMS = {"adamw": AdamWConfig(), "muon": MuonConfig(), "adafactor": AdafactorConfig(min_dim_size_to_factor=8)}


def experiment(directory, grouping="scanned", algorithm="adamw", mesh=None, **run):
    """A model of four layers, saved at every step."""
    directory.mkdir(exist_ok=True)
    if not (directory / "text.txt").exists():
        toy.write_text(directory, num_words=400)
    pipeline = PipelineConfig(num_microbatches=4)
    stack = dataclasses.replace(toy.model().stack, num_layers=4, pipeline=pipeline, **GROUPINGS[grouping])
    saves = CheckpointConfig(save_every_steps=1, keep_last=STEPS, asynchronous=False)
    made = toy.experiment(
        directory,
        decoder=toy.model(d_model=16, stack=stack),
        mesh=mesh,
        **{"steps": STEPS, "ema_decay": 0.9, "evaluate_every_steps": 100, "checkpoints": saves, **run},
    )
    return dataclasses.replace(made, optimizer=dataclasses.replace(made.optimizer, algorithm=ALGORITHMS[algorithm]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trains without a change, once for each grouping and algorithm; gives the directory and the final state."""
    runs = {}

    def run(grouping, algorithm="adamw"):
        if (grouping, algorithm) not in runs:
            directory = tmp_path_factory.mktemp("whole")
            runs[grouping, algorithm] = directory, train(experiment(directory, grouping, algorithm)).state
        return runs[grouping, algorithm]

    return run


def resume(directory, whole, changed, devices=1):
    """Goes on with a copy of a run at `CHANGES_AT`."""
    shutil.copytree(whole / "run", directory / "run")
    for step in range(CHANGES_AT + 1, STEPS + 1):
        shutil.rmtree(directory / "run" / "checkpoints" / str(step))
    return train(changed, devices=devices).state


def assert_as_never_changed(state, changed, expected, unchanged, tolerance=1e-6):
    np.testing.assert_allclose([r[2] for r in trace(changed)], [r[2] for r in trace(unchanged)], rtol=tolerance)
    assert [r[:2] for r in trace(changed)] == [r[:2] for r in trace(unchanged)]
    layers = [e.model.layers for e in (unchanged, changed)]
    expected = relaid(by_name(jax.device_get(expected)), *layers)
    for name, array in by_name(jax.device_get(state)).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=tolerance, err_msg="/".join(name))


@pytest.mark.parametrize(
    ("before", "after", "algorithm"),
    [
        ("scanned", "unrolled", "adamw"),
        ("unrolled", "scanned", "adamw"),
        ("scanned", "unrolled", "muon"),
        ("unrolled", "first and a rest", "adafactor"),
    ],
)
def test_resuming_with_other_places_changes_no_number(whole, tmp_path, before, after, algorithm):
    directory, state = whole(before, algorithm)
    changed = experiment(tmp_path, after, algorithm)
    resumed = resume(tmp_path, directory, changed)
    assert_as_never_changed(resumed, changed, state, experiment(directory, before, algorithm))


@pytest.mark.parametrize("after", ["unrolled", "cycle of two"])
def test_also_on_a_mesh_that_parts_the_layers(whole, tmp_path, after):
    directory, state = whole("scanned")
    mesh = MeshConfig(data=2, tensor=2)
    changed = experiment(tmp_path, after, mesh=mesh)
    resumed = resume(tmp_path, directory, changed, devices=4)
    kernel = resumed.opt_state[1].mu["stack"]["unrolled" if after == "unrolled" else "scanned"]["0"]["mixer"]["query"]
    assert "tensor" in kernel["kernel"].sharding.spec
    assert_as_never_changed(resumed, changed, state, experiment(directory), tolerance=1e-5)


def test_pipeline_stages_ask_for_scanned_layers_and_get_them(whole, tmp_path):
    directory, state = whole("unrolled")
    mesh = MeshConfig(data=1, stage=2)
    with pytest.raises(UserError, match=r"StackConfig.scan_layers = True, also to resume a run"):
        resume(tmp_path, directory, experiment(tmp_path, "unrolled", mesh=mesh), devices=2)
    shutil.rmtree(tmp_path / "run")
    changed = experiment(tmp_path, "scanned", mesh=mesh)
    resumed = resume(tmp_path, directory, changed, devices=2)
    assert_as_never_changed(resumed, changed, state, experiment(directory, "unrolled"), tolerance=1e-5)


def test_a_run_begins_with_layers_of_other_places(whole, tmp_path):
    directory, state = whole("scanned")
    begin = InitialCheckpointConfig(model_dir=str(directory / "run"))
    made = experiment(tmp_path, "unrolled", initialize_from=begin)
    params = starting(made).params
    layers = experiment(directory).model.layers, made.model.layers
    expected = relaid(by_name(jax.device_get(state.params)), *layers)
    assert len(expected) == len(jax.tree.leaves(params))
    for name, array in by_name(params).items():
        np.testing.assert_array_equal(array, expected[name])
    some = dataclasses.replace(begin, parameters="stack/unrolled/2/.*")
    fresh = starting(experiment(tmp_path, "unrolled")).params["stack"]["unrolled"]
    mixed = starting(experiment(tmp_path, "unrolled", initialize_from=some)).params["stack"]["unrolled"]
    jax.tree.map(np.testing.assert_array_equal, mixed["2"], params["stack"]["unrolled"]["2"])
    jax.tree.map(np.testing.assert_array_equal, mixed["1"], fresh["1"])


def starting(made):
    """The state of step 0."""
    job = set_up(made, build_mesh(made.mesh, jax.devices()[:1]), 259)
    state, source = initial_state(job.create_state, job.state), made.run.initialize_from
    return state if source is None else with_parameters_of(source, state, job.model.layers)


def test_a_checkpoint_without_its_places_is_refused_only_where_they_differ(whole, tmp_path):
    directory, _ = whole("scanned")
    original = loop.Checkpoints.manifest
    without = lambda self, step=None: {k: v for k, v in original(self, step).items() if k != "layers"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Checkpoints, "manifest", without)
        assert train(experiment(directory)).state is not None
        with pytest.raises(UserError, match=r"does not fit this model:\n.*stack/unrolled/0/.*saved nothing"):
            resume(tmp_path, directory, experiment(tmp_path, "unrolled"))


def test_what_may_change_is_where_layers_are_and_not_what_they_are(tmp_path):
    directory, plain = RunDirectory(tmp_path), experiment(tmp_path / "a", "scanned")
    versions = {"t5x_like": "0.2.0"}
    directory.config.write_text(json.dumps({"experiment": to_dict(plain), "versions": versions}))
    for grouping in GROUPINGS:
        made = experiment(tmp_path / "a", grouping)
        assert forbidden_changes(directory, made) == []
        stack = dataclasses.replace(made.model.stack, remat="full", pipeline=PipelineConfig(num_microbatches=2))
        model = dataclasses.replace(made.model, stack=stack)
        assert forbidden_changes(directory, dataclasses.replace(made, model=model)) == []
    wide = dataclasses.replace(BLOCK, feedforward=dataclasses.replace(BLOCK.feedforward, d_ff=32))
    for stack, line in [
        ({"block": wide}, "model.stack.block.feedforward.d_ff: 64 -> 32"),
        ({"block": (BLOCK, wide)}, "model.stack.block: "),
        ({"first": (wide,)}, "model.stack.first: "),
        ({"num_layers": 6}, "model.stack.num_layers: 4 -> 6"),
    ]:
        model = dataclasses.replace(plain.model, stack=dataclasses.replace(plain.model.stack, **stack))
        (change,) = forbidden_changes(directory, dataclasses.replace(plain, model=model))
        assert change.startswith(line)


def test_the_same_may_change_in_an_encoder_decoder(tmp_path):
    directory, plain = RunDirectory(tmp_path), experiment(tmp_path / "a", "scanned")
    crossing = dataclasses.replace(BLOCK, cross_attention=AttentionConfig(num_heads=4))
    stacks = {"encoder": plain.model.stack, "decoder": dataclasses.replace(plain.model.stack, block=crossing)}
    data = dataclasses.replace(plain.data, objective=SpanCorruption())

    def model(**changed):
        both = {name: dataclasses.replace(stack, **changed.get(name, {})) for name, stack in stacks.items()}
        return dataclasses.replace(plain, data=data, model=EncoderDecoderConfig(d_model=16, **both))

    saved = {"experiment": to_dict(model()), "versions": {"t5x_like": "0.2.0"}}
    directory.config.write_text(json.dumps(saved))
    changed = model(encoder={"scan_layers": False, "remat": "full"}, decoder={"block": (crossing, crossing)})
    assert forbidden_changes(directory, changed) == []
    assert changed.model.layers["encoder/unrolled/3"] == (3,)
    assert changed.model.layers["decoder/scanned/1"] == (1, 3)
    assert forbidden_changes(directory, model(decoder={"num_layers": 5})) == ["model.decoder.num_layers: 4 -> 5"]
