"""Where a token stands: learned and sinusoidal embeddings, rotary attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.models.parameters import Initializer, Module, parameter
from t5x_like.sharding.logical import constrain


@configurable
class LearnedPositionsConfig:
    """A trained vector per position, added to the token embedding (GPT-2, BERT).

    Attributes:
      max_length: number of positions; longer sequences are refused.
    """

    max_length: int

    def __post_init__(self):
        if self.max_length < 1:
            raise UserError(f"LearnedPositionsConfig.max_length is {self.max_length}: it must be at least 1.")


@configurable
class SinusoidalPositionsConfig:
    """Fixed sines and cosines added to the token embedding (Vaswani et al. 2017, section 3.5).

    Attributes:
      max_wavelength: longest wavelength divided by 2 pi, in tokens.
    """

    max_wavelength: float = 10_000.0


@configurable
class RotaryConfig:
    """Rotary position embedding of queries and keys (Su et al. 2021), in the half-rotate layout of Llama.

    Attributes:
      theta: base of the geometric sequence of wavelengths.
    """

    theta: float = 10_000.0

    def __post_init__(self):
        if self.theta <= 0:
            raise UserError(f"RotaryConfig.theta is {self.theta}: it must be positive.")


class LearnedPositions(Module):
    def __init__(self, config: LearnedPositionsConfig, d_model: int, *, init: Initializer, key: PRNGKeyArray):
        shape = (config.max_length, d_model)
        self.embedding = parameter(init(key, shape, *shape), ("position", "embed"))

    def __call__(self, positions: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        return constrain(self.embedding[...], None, None)[positions]


def sinusoidal(
    config: SinusoidalPositionsConfig, positions: Int[Array, "batch length"], d_model: int
) -> Float[Array, "batch length embed"]:
    """First half sines, second half cosines, wavelengths geometric from 2 pi to 2 pi * max_wavelength."""
    half = d_model // 2
    frequencies = config.max_wavelength ** (-jnp.arange(half) / max(half - 1, 1))
    angles = positions[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], config: RotaryConfig
) -> Float[Array, "batch length heads head_dim"]:
    """Turns each pair (x[i], x[i + head_dim / 2]) by position * theta ** (-2 i / head_dim), in float32."""
    half = x.shape[-1] // 2
    frequencies = config.theta ** (-jnp.arange(half) / half)
    angles = positions[:, :, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
