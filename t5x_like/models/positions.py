"""Where a token stands: learned and sinusoidal embeddings, rotary attention."""

import math

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
class LinearScaling:
    """Rotary positions divided by a factor (position interpolation, Chen et al. 2023).

    Attributes:
      factor: how many times longer texts become than those the model was trained on.
    """

    factor: float

    def __post_init__(self):
        _check_factor(self)

    def rescale(self, frequencies: Float[Array, "half"], theta: float) -> Float[Array, "half"]:
        return frequencies / self.factor


@configurable
class Llama3Scaling:
    """Slow rotations divided by a factor, fast ones left alone, a blend between them (Llama 3.1).

    Attributes:
      factor: how many times longer texts become than `original_length`.
      original_length: tokens of the texts the model was trained on first.
      low_frequency_turns: rotations with fewer turns within `original_length` are divided by the factor.
      high_frequency_turns: rotations with more are left alone.
    """

    factor: float
    original_length: int
    low_frequency_turns: float = 1.0
    high_frequency_turns: float = 4.0

    def __post_init__(self):
        _check_factor(self)
        if self.low_frequency_turns >= self.high_frequency_turns:
            raise UserError(
                f"Llama3Scaling.low_frequency_turns ({self.low_frequency_turns}) must be less than "
                f"high_frequency_turns ({self.high_frequency_turns})."
            )

    def rescale(self, frequencies: Float[Array, "half"], theta: float) -> Float[Array, "half"]:
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_turns, self.high_frequency_turns
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@configurable
class YarnScaling:
    """YaRN (Peng et al. 2023): as Llama 3's, blended linearly over the dims, and with sharper attention.

    Attributes:
      factor: how many times longer texts become than `original_length`.
      original_length: tokens of the texts the model was trained on first.
      beta_fast: rotations with more turns within `original_length` are left alone.
      beta_slow: rotations with fewer are divided by the factor.
      whole_dims: the blend begins and ends at whole dims.
      attention_factor: factor on rotated queries and on rotated keys; None: 0.1 * ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_dims: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        _check_factor(self)
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"YarnScaling.beta_slow ({self.beta_slow}) must be positive and less than beta_fast ({self.beta_fast})."
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise UserError(f"YarnScaling.attention_factor is {self.attention_factor}: it must be positive, or None.")

    @property
    def magnitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def rescale(self, frequencies: Float[Array, "half"], theta: float) -> Float[Array, "half"]:
        half = len(frequencies)
        # The (fractional) dim that makes so many turns within the original length.
        first, last = (
            half * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.whole_dims:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        # The reference implementation's guard against a blend of no width.
        width = last - first or 0.001
        kept = 1 - jnp.clip((jnp.arange(half) - first) / width, 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def _check_factor(scaling: LinearScaling | Llama3Scaling | YarnScaling) -> None:
    name, length = type(scaling).__name__, getattr(scaling, "original_length", 1)
    if scaling.factor < 1:
        raise UserError(f"{name}.factor is {scaling.factor}: it must be at least 1.")
    if length < 1:
        raise UserError(f"{name}.original_length is {length}: it must be at least 1.")


@configurable
class RotaryConfig:
    """Rotary position embedding of queries and keys (Su et al. 2021), in the half-rotate layout of Llama.

    Attributes:
      theta: base of the geometric sequence of wavelengths.
      scaling: how rotations are slowed down for texts longer than those trained on; None: they are not.
    """

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self):
        if self.theta <= 0:
            raise UserError(f"RotaryConfig.theta is {self.theta}: it must be positive.")
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            raise UserError(f"RotaryConfig.theta is {self.theta}: with YarnScaling it must be above 1.")

    def frequencies(self, half: int) -> Float[Array, "half"]:
        """Radians per position, of each pair of dims."""
        frequencies = self.theta ** (-jnp.arange(half) / half)
        return frequencies if self.scaling is None else self.scaling.rescale(frequencies, self.theta)


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
    """Turns each pair (x[i], x[i + head_dim / 2]) by position * theta ** (-2 i / head_dim), in float32.

    A scaling changes the frequencies, and YaRN's the length of the result.
    """
    angles = positions[:, :, None, None] * config.frequencies(x.shape[-1] // 2)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if isinstance(config.scaling, YarnScaling):
        sin, cos = sin * config.scaling.magnitude, cos * config.scaling.magnitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
