"""With T5X_LIKE_TYPED=1 calls are checked against annotations, in JAX's traces too."""

import os

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from t5x_like.models.norms import NormConfig

pytestmark = [
    pytest.mark.typed,
    pytest.mark.skipif(os.environ.get("T5X_LIKE_TYPED") != "1", reason="needs T5X_LIKE_TYPED=1"),
]


def test_a_call_of_another_type_is_refused():
    norm = NormConfig().build(4)
    jax.eval_shape(norm, jnp.zeros((2, 4)))
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        jax.eval_shape(norm, jnp.zeros((2, 4), int))
