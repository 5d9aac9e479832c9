"""The one definition of the logits: its order of effects, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.attention.logits import MASK_VALUE, attention_logits, through_soft_cap

PRODUCTS, BIAS = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
ALLOWED = np.arange(12).reshape(3, 4) % 3 != 0


def test_order_is_scale_bias_soft_cap_mask():
    logits = attention_logits(PRODUCTS, ALLOWED, BIAS, scale=0.5, soft_cap=2.0)
    expected = np.where(ALLOWED, 2 * np.tanh((PRODUCTS * 0.5 + BIAS) / 2), MASK_VALUE)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


@pytest.mark.parametrize("soft_cap", [None, 0.7])
def test_derivative(soft_cap):
    function = lambda bias: attention_logits(jnp.asarray(PRODUCTS), ALLOWED, bias, scale=0.5, soft_cap=soft_cap)
    logits, pull = jax.vjp(function, BIAS)
    gradient = np.where(ALLOWED, PRODUCTS, 0)
    np.testing.assert_allclose(through_soft_cap(gradient, logits, soft_cap), pull(gradient)[0], atol=1e-6)
