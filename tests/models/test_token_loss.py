import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.errors import UserError
from t5x_like.learning.loss import LossConfig
from t5x_like.models.token_loss import token_loss
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


def plain(config, hidden, head, labels, weights, soft_cap=None):
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    one_hot = jax.nn.one_hot(labels, VOCAB)
    if config.kind == "mean_squared_error":
        losses = jnp.mean(jnp.square(logits - one_hot), axis=-1)
    else:
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, config.label_smoothing))
        losses += config.z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(losses * weights)


CONFIGS = {
    "plain": (LossConfig(), None),
    "chunked, soft-cap": (LossConfig(chunk_tokens=7), 3.0),
    "smoothed": (LossConfig(label_smoothing=0.1, z_loss=1e-2, chunk_tokens=7), None),
    "squared": (LossConfig(kind="mean_squared_error"), None),
}
MESHES = {
    "one": (MeshConfig(), 1),
    "vocabulary": (MeshConfig(tensor=4), 4),
    "all": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize(("config", "soft_cap"), CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_are_those_of_the_formula_on_any_mesh(config, soft_cap, mesh, inputs):
    hidden, head, labels, weights = inputs

    def ours(hidden, head):
        sums = token_loss(config, hidden, head, labels, weights, soft_cap=soft_cap)
        return sums.objective, sums.correct

    formula = lambda hidden, head: plain(config, hidden, head, labels, weights, soft_cap)
    with jax.set_mesh(build_mesh(mesh[0], jax.devices()[: mesh[1]])):
        (value, correct), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    expected, expected_gradients = jax.value_and_grad(formula, (0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    hits = jnp.einsum("btd,vd->btv", hidden, head).argmax(-1) == labels
    np.testing.assert_allclose(correct, jnp.sum(hits * weights), rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_in_shares_is_never_gathered(inputs):
    """Per chunk the largest logit and the sums pass between devices, and once the gradient of the hidden vectors."""
    config = LossConfig(chunk_tokens=8)
    loss = lambda *arrays: token_loss(config, *arrays).objective
    mesh = build_mesh(MeshConfig(tensor=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        whole, share = (jax.NamedSharding(mesh, jax.P(axis)) for axis in (None, "tensor"))
        gradient = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(whole, share, whole, whole))
        program = gradient.lower(*inputs).compile().as_text()
    collectives = re.findall(
        r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program
    )
    assert collectives == ["all-reduce"] * 3
    assert f"{VOCAB},{EMBED}" not in program  # no device holds the whole head, nor its gradient


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
