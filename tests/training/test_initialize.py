import dataclasses

import jax
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.initialize import InitialCheckpointConfig, with_parameters_of
from t5x_like.training.job import set_up
from t5x_like.training.state import initial_state
from tests import toy
from tests.training.test_loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a finished run, and its parameters."""
    directory = tmp_path_factory.mktemp("first")
    toy.write_text(directory)
    outcome = train(toy.experiment(directory, steps=2))
    return directory / "run", jax.device_get(outcome.state.params)


def fresh(tmp_path, **options):
    job = set_up(toy.experiment(tmp_path, **options), build_mesh(MeshConfig(), jax.devices()[:1]), 259)
    return initial_state(job.create_state, job.state)


def begin(config, state):
    return with_parameters_of(config, state, toy.model().layers)


def test_all_parameters_are_taken_and_the_rest_begins_anew(trained, tmp_path):
    model_dir, params = trained
    state = begin(InitialCheckpointConfig(model_dir=str(model_dir)), fresh(tmp_path, ema_decay=0.9))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), params)
    assert int(state.step) == 0
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len(set(buffers)) == len(buffers), "a donated state must not hold a buffer twice"


def test_a_pattern_chooses_by_name(trained, tmp_path):
    model_dir, params = trained
    before = fresh(tmp_path)
    state = begin(InitialCheckpointConfig(model_dir=str(model_dir), parameters="embedding"), before)
    np.testing.assert_array_equal(state.params["embedding"], params["embedding"])
    jax.tree.map(np.testing.assert_array_equal, state.params["stack"], before.params["stack"])


def test_a_run_begins_there_on_another_mesh(trained, tmp_path):
    model_dir, params = trained
    toy.write_text(tmp_path)
    experiment = toy.experiment(
        tmp_path, mesh=MeshConfig(data=1, fsdp=2), initialize_from=InitialCheckpointConfig(model_dir=str(model_dir))
    )
    slow = dataclasses.replace(experiment.optimizer.schedule, learning_rate=1e-30)
    experiment = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, schedule=slow))
    outcome = train(experiment, devices=2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(outcome.state.params), params)


def test_mistakes_are_named(trained, tmp_path):
    model_dir, _ = trained
    state = fresh(tmp_path)
    with pytest.raises(UserError, match="no regular expression"):
        InitialCheckpointConfig(model_dir="a", parameters="(")
    with pytest.raises(UserError, match="names no parameter of this model; it has embedding, "):
        begin(InitialCheckpointConfig(model_dir=str(model_dir), parameters="encoder/.*"), state)
    with pytest.raises(UserError, match="There is no checkpoint in"):
        begin(InitialCheckpointConfig(model_dir=str(tmp_path)), state)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        begin(InitialCheckpointConfig(model_dir=str(model_dir), step=7), state)
    with pytest.raises(UserError, match="does not fit this model"):
        begin(InitialCheckpointConfig(model_dir=str(model_dir)), fresh(tmp_path, decoder=toy.model(d_model=64)))
