"""Where matrices are in parameters of every layout; their updates are compared in test_optimizers.py."""

import jax.numpy as jnp
import pytest

from t5x_like.training.parameter_layouts import layouts_of

SIZES = {"layers": 2, "expert": 3, "embed": 5, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp": 7, "vocab": 9}


@pytest.mark.parametrize(
    ("key", "axes", "shape"),
    [
        ("kernel", "embed mlp", (5, 7)),
        ("kernel", "mlp embed", (7, 5)),
        ("kernel", "embed heads head_dim", (5, 24)),
        ("kernel", "layers embed kv_heads head_dim", (2, 5, 12)),
        ("kernel", "layers heads head_dim embed", (2, 24, 5)),
        ("kernel", "layers expert embed mlp", (2, 3, 5, 7)),
        ("embedding", "vocab embed", (9, 5)),
    ],
)
def test_matrices(key, axes, shape):
    layout = layouts_of({key: tuple(axes.split())})[key]
    x = jnp.zeros([SIZES[name] for name in layout.axes])
    assert layout.is_matrix
    assert layout.as_matrices(x).shape == shape
    assert len(layout.own_dims) == x.ndim - (len(shape) - 2)


@pytest.mark.parametrize(
    ("key", "axes"),
    [
        ("bias", "heads head_dim"),
        ("bias", "layers expert mlp"),
        ("scale", "layers embed"),
        ("kernel", "layers embed"),
        ("temperature", ""),
    ],
)
def test_vectors(key, axes):
    assert not layouts_of({key: tuple(axes.split())})[key].is_matrix
