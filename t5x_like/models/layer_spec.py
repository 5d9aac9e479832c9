"""What the parts of a layer are built from."""

import dataclasses

import jax.numpy as jnp

from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.parameters import Initializers


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What every part of a layer is built from.

    Attributes:
      d_model: width of the residual stream.
      mask: which tokens may see which: causal, or all.
      inits: how projections start.
      dtype: of activations and matrix products.
    """

    d_model: int
    mask: MaskSpec
    inits: Initializers
    dtype: jnp.dtype
