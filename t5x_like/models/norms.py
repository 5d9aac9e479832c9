"""Normalisation layers, computed in float32."""

import abc
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.models.parameters import Module, parameter


class Norm(abc.ABC):
    """The role of a normalisation of the last dim.

    Attributes:
      epsilon: what keeps it from dividing by 0.
    """

    epsilon: float = 0.0

    @abc.abstractmethod
    def build(self, size: int) -> Module:
        """The layer for a last dim of this size: vectors in, vectors out."""


@configurable
class NormConfig(Norm):
    """Normalisation of the last dim, with a learned scale.

    Attributes:
      kind: `rmsnorm` (Zhang & Sennrich 2019) divides by the root mean square; `layernorm` (Ba et al. 2016) also
        subtracts the mean.
      use_bias: adds a learned bias.
      zero_centered: the scale is kept as its difference to 1 (Gemma), so that decay draws it to 1.
      epsilon: added to the mean square before the root.
    """

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    use_bias: bool = False
    zero_centered: bool = False
    epsilon: float = 1e-6

    def __post_init__(self):
        if self.epsilon <= 0:
            raise UserError(f"NormConfig.epsilon is {self.epsilon}: it must be positive.")

    def build(self, size: int) -> Module:
        return ScaledNorm(self, size)


class ScaledNorm(Module):
    def __init__(self, config: NormConfig, size: int):
        self.scale = parameter(jnp.zeros(size) if config.zero_centered else jnp.ones(size), ("norm",))
        self.bias = parameter(jnp.zeros(size), ("norm",)) if config.use_bias else None
        self.config = config

    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        y = _standardize(x.astype(jnp.float32), self.config.kind == "layernorm", self.config.epsilon)
        y = y * (1 + self.scale[...] if self.config.zero_centered else self.scale[...])
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _standardize(x: Float[Array, "... embed"], center: bool, epsilon: float) -> Float[Array, "... embed"]:
    """Divides by the root mean square, after subtracting the mean if `center`.

    The gradient is written in terms of the result; derived automatically, it takes several more passes over arrays of
    the size of x.
    """
    return _standardize_forward(x, center, epsilon)[0]


def _standardize_forward(x, center, epsilon):
    if center:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * inverse, (x * inverse, inverse)


def _standardize_backward(center, epsilon, residuals, dy):
    y, inverse = residuals
    dx = dy - y * jnp.mean(dy * y, axis=-1, keepdims=True)
    if center:
        dx = dx - jnp.mean(dy, axis=-1, keepdims=True)
    return (inverse * dx,)


_standardize.defvjp(_standardize_forward, _standardize_backward)
