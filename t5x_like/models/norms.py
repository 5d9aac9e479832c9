"""Normalisation layers, computed in float32."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.models.parameters import Module, parameter


@configurable
class NormConfig:
    """Normalisation of the last dim, with a learned scale.

    Attributes:
      kind: `rmsnorm` (Zhang & Sennrich 2019) divides by the root mean square; `layernorm` (Ba et al. 2016) also
        subtracts the mean.
      use_bias: adds a learned bias.
      epsilon: added to the mean square before the root.
    """

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    use_bias: bool = False
    epsilon: float = 1e-6

    def __post_init__(self):
        if self.epsilon <= 0:
            raise UserError(f"NormConfig.epsilon is {self.epsilon}: it must be positive.")


class Norm(Module):
    def __init__(self, config: NormConfig, size: int):
        self.scale = parameter(jnp.ones(size), ("norm",))
        self.bias = parameter(jnp.zeros(size), ("norm",)) if config.use_bias else None
        self.config = config

    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        y = x.astype(jnp.float32)
        if self.config.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.epsilon)
        y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)
