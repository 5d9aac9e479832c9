import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.errors import UserError
from t5x_like.models.losses import LossConfig, token_loss
from t5x_like.sharding.mesh import MeshConfig, build_mesh

BATCH, LENGTH, EMBED, VOCAB = 8, 6, 16, 24


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (BATCH, LENGTH, EMBED)),
        jax.random.normal(keys[1], (VOCAB, EMBED)),
        jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB),
        jax.random.uniform(keys[3], (BATCH, LENGTH)),
    )


def plain(config, hidden, head, labels, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    one_hot = jax.nn.one_hot(labels, VOCAB)
    if config.kind == "mean_squared_error":
        losses = jnp.mean(jnp.square(logits - one_hot), axis=-1)
    else:
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, config.label_smoothing))
        losses += config.z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(losses * weights)


CONFIGS = {
    "plain": LossConfig(),
    "chunked": LossConfig(chunk_tokens=7),
    "smoothed": LossConfig(label_smoothing=0.1, z_loss=1e-2, chunk_tokens=7),
    "squared": LossConfig(kind="mean_squared_error"),
}
MESHES = {"one": (MeshConfig(), 1), "all": (MeshConfig(data=2, fsdp=2, tensor=2), 8)}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_are_those_of_the_formula_on_any_mesh(config, mesh, inputs):
    hidden, head, labels, weights = inputs
    ours = lambda hidden, head: token_loss(config, hidden, head, labels, weights).objective
    formula = lambda hidden, head: plain(config, hidden, head, labels, weights)
    with jax.set_mesh(build_mesh(mesh[0], jax.devices()[: mesh[1]])):
        value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    expected, expected_gradients = jax.value_and_grad(formula, (0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"label_smoothing": 1.0},
        {"z_loss": -1.0},
        {"chunk_tokens": 0},
        {"kind": "mean_squared_error", "z_loss": 1e-4},
    ],
)
def test_impossible_losses_are_refused(bad):
    with pytest.raises(UserError, match=r"LossConfig\.\w+ is"):
        LossConfig(**bad)
