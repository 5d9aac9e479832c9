import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from t5x_like.models.parameters import merge
from t5x_like.sharding.logical import on_devices
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.job import Job, compile_step, set_up
from t5x_like.training.optimizers import AdafactorConfig, MuonConfig
from t5x_like.training.state import initial_state, random_key
from tests import toy

MESHES = {
    "1": (MeshConfig(), 1),
    "data=2 x fsdp=2": (MeshConfig(data=2, fsdp=2), 4),
    "tensor=4": (MeshConfig(data=1, tensor=4), 4),
    "data=2 x fsdp=2 x tensor=2": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
}


def job_on(mesh: str, tmp_path, decoder=None, optimizer=None, **run) -> Job:
    config, num_devices = MESHES[mesh]
    experiment = toy.experiment(tmp_path, mesh=config, decoder=decoder, **run)
    if optimizer is not None:
        experiment = dataclasses.replace(
            experiment, optimizer=dataclasses.replace(experiment.optimizer, algorithm=optimizer)
        )
    return set_up(experiment, build_mesh(config, jax.devices()[:num_devices]), toy.VOCAB)


def run(job: Job, batches) -> tuple[list[float], dict]:
    """The losses of a few steps, and the final parameters on the host."""
    losses = []
    with jax.set_mesh(job.mesh):
        state, step = initial_state(job.create_state, job.state), compile_step(job)
        for batch in batches:
            state, metrics = step(state, on_devices(batch, job.batch))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


@pytest.fixture(scope="module")
def twenty_batches():
    return [toy.batch(seed) for seed in range(20)]


@pytest.fixture(scope="module")
def on_one_device(twenty_batches, tmp_path_factory):
    job = job_on("1", tmp_path_factory.mktemp("run"), decoder=toy.model(dropout_rate=0.1), ema_decay=0.9)
    return run(job, twenty_batches)


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_every_mesh_gives_the_loss_trace_of_one_device(mesh, twenty_batches, on_one_device, tmp_path):
    job = job_on(mesh, tmp_path, decoder=toy.model(dropout_rate=0.1), ema_decay=0.9)
    losses, state = run(job, twenty_batches)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    for ours, one in zip(jax.tree.leaves(state.ema), jax.tree.leaves(on_one_device[1].ema), strict=True):
        np.testing.assert_allclose(ours, one, atol=2e-4)


@pytest.mark.parametrize(
    "optimizer", [AdafactorConfig(min_dim_size_to_factor=8), MuonConfig()], ids=["adafactor", "muon"]
)
def test_optimizers_that_see_matrices_do_not_see_the_mesh(optimizer, twenty_batches, tmp_path):
    traces = [
        run(job_on(mesh, tmp_path, optimizer=optimizer), twenty_batches[:5])[0] for mesh in ("1", list(MESHES)[3])
    ]
    np.testing.assert_allclose(traces[0], traces[1], rtol=1e-5)


def test_initial_parameters_are_equal_bit_for_bit_on_every_mesh(tmp_path):
    states = []
    for mesh in MESHES:
        job = job_on(mesh, tmp_path)
        states.append(jax.device_get(initial_state(job.create_state, job.state)))
        assert jax.tree.map(jnp.shape, states[-1]) == jax.tree.map(lambda a: a.shape, job.state)
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], other)


def test_fsdp_and_tensor_shard_parameters_and_optimizer_state(tmp_path):
    job = job_on("data=2 x fsdp=2 x tensor=2", tmp_path)
    kernel = job.state.params["stack"]["scanned"]["0"]["mixer"]["query"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor", None)
    moments = job.state.opt_state[1].mu["stack"]["scanned"]["0"]["mixer"]["query"]["kernel"]
    assert moments.sharding == kernel.sharding
    assert job.state.params["embedding"].sharding.spec == P("tensor", "fsdp")


def test_microbatches_with_unequal_masks_give_the_gradient_of_the_whole_batch(tmp_path):
    weights = np.zeros((toy.BATCH, toy.LENGTH), np.float32)
    weights[0], weights[1, :3], weights[5, 2] = 1, 1, 0.5
    batch = toy.batch(weights=weights)
    whole, whole_state = run(job_on("1", tmp_path), [batch])
    parts, parts_state = run(job_on("1", tmp_path, gradient_accumulation=4), [batch])
    sharded, sharded_state = run(job_on("data=2 x fsdp=2", tmp_path, gradient_accumulation=2), [batch])
    np.testing.assert_allclose([parts[0], sharded[0]], whole[0], rtol=1e-6)
    for state in (parts_state, sharded_state):
        # The first moment after one step is a tenth of the gradient: Adam's update itself would hide its scale.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            state.opt_state[1].mu,
            whole_state.opt_state[1].mu,
        )


def test_a_step_is_the_plain_update(tmp_path):
    job, batch = job_on("1", tmp_path, ema_decay=0.75), toy.batch()
    before = initial_state(job.create_state, job.state)
    weights = batch["decoder_loss_weights"]

    def loss(params):
        model = merge(job.spec.graphdef, params)
        logits = model.head.scores(model(toy.tokens(batch["decoder_input_tokens"]))[0], model.embedding[...])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["decoder_target_tokens"])
        return jnp.sum(losses * weights) / jnp.sum(weights)

    value, grads = jax.value_and_grad(loss)(before.params)
    after, metrics = jax.jit(job.train_step)(before, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    np.testing.assert_allclose(metrics["num_tokens"], weights.sum())
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 / 3, rtol=1e-6)
    clipped = jax.tree.map(lambda g: g / jnp.maximum(1, optax.tree.norm(grads)), grads)
    jax.tree.map(
        lambda m, g: np.testing.assert_allclose(m, 0.1 * g, rtol=1e-3, atol=1e-7), after.opt_state[1].mu, clipped
    )
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema, expected)


def test_a_batch_without_weights_changes_nothing_but_decay(tmp_path):
    losses, state = run(job_on("1", tmp_path), [toy.batch(weights=np.zeros((toy.BATCH, toy.LENGTH), np.float32))])
    assert losses == [0.0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_random_streams_are_apart():
    keys = [random_key(seed, stream, step) for seed in (0, 1) for stream in ("params", "dropout") for step in (0, 1)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)


def test_sharding_brings_no_gather_of_activations(tmp_path):
    """Data parallelism needs one reduction of gradients and nothing else."""
    config = MeshConfig(data=8)
    job = set_up(toy.experiment(tmp_path, mesh=config), build_mesh(config), toy.VOCAB)
    text = compile_step(job).as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
