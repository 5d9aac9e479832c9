"""Where a token stands: learned and sinusoidal embeddings, rotary attention."""

import abc
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.models.parameters import Initializer, Module, parameter
from t5x_like.sharding.logical import constrain

Frequencies = Float[Array, "half"]
Length = Int[Array, ""]


class Positions(abc.ABC):
    """The role of absolute positions, which are added to the embedded tokens.

    Attributes:
      max_length: numbers of positions that there are; None: no limit.
      offset: how many of them come before that of position 0.
    """

    max_length: int | None = None
    offset: int = 0

    @abc.abstractmethod
    def build(self, d_model: int, *, init: Initializer, key: PRNGKeyArray) -> Module:
        """The layer that makes vectors [batch, length, d_model] of positions [batch, length]."""

    def check(self, d_model: int) -> None:  # noqa: B027
        """Refuses vectors of a size that cannot be made."""

    def check_length(self, length: int) -> None:  # noqa: B027
        """Refuses sequences that are longer than the positions reach."""


@configurable
class LearnedPositionsConfig(Positions):
    """A trained vector per position, added to the token embedding (GPT-2, BERT).

    Attributes:
      max_length: rows of the table; longer sequences are refused.
      offset: rows before that of position 0, which no token has (RoBERTa: 2).
    """

    max_length: int
    offset: int = 0

    def __post_init__(self):
        if self.max_length < 1:
            raise UserError(f"LearnedPositionsConfig.max_length is {self.max_length}: it must be at least 1.")
        if not 0 <= self.offset < self.max_length:
            raise UserError(
                f"LearnedPositionsConfig.offset is {self.offset}: it must be below max_length ({self.max_length})."
            )

    def build(self, d_model: int, *, init: Initializer, key: PRNGKeyArray) -> Module:
        return LearnedPositions(self, d_model, init=init, key=key)

    def check_length(self, length: int) -> None:
        if self.max_length - self.offset < length:
            raise UserError(
                f"DataConfig.sequence_length ({length}) exceeds LearnedPositionsConfig.max_length "
                f"({self.max_length}): lower the one or raise the other."
            )


@configurable
class SinusoidalPositionsConfig(Positions):
    """Fixed sines and cosines added to the token embedding (Vaswani et al. 2017, section 3.5).

    Attributes:
      max_wavelength: longest wavelength divided by 2 pi, in tokens.
    """

    max_wavelength: float = 10_000.0

    def build(self, d_model: int, *, init: Initializer, key: PRNGKeyArray) -> Module:
        return SinusoidalPositions(self, d_model)

    def check(self, d_model: int) -> None:
        if d_model % 2:
            raise UserError(f"d_model is {d_model}: sinusoidal positions need an even d_model.")


class RotaryScaling(abc.ABC):
    """The role of what slows down rotary positions in texts that are longer than those trained on.

    Attributes:
      magnitude: factor on rotated queries and on rotated keys.
    """

    magnitude: float = 1.0

    @abc.abstractmethod
    def rescale(self, frequencies: Frequencies, theta: float, length: Length) -> Frequencies:
        """The frequencies in texts of `length` tokens."""

    def check(self, theta: float) -> None:  # noqa: B027
        """Refuses a base of the wavelengths that does not fit."""


@configurable
class LinearScaling(RotaryScaling):
    """Rotary positions divided by a factor (position interpolation, Chen et al. 2023).

    Attributes:
      factor: how many times longer texts become than those the model was trained on.
    """

    factor: float

    def __post_init__(self):
        _check_at_least_1(self, "factor")

    def rescale(self, frequencies: Frequencies, theta: float, length: Length) -> Frequencies:
        return frequencies / self.factor


@configurable
class DynamicScaling(RotaryScaling):
    """A larger base for longer texts (NTK-aware scaling): texts of up to `original_length` tokens stay as they are.

    Attributes:
      factor: how the base grows with what exceeds `original_length`.
      original_length: tokens of the texts the model was trained on.
    """

    factor: float
    original_length: int

    def __post_init__(self):
        _check_at_least_1(self, "factor", "original_length")

    def rescale(self, frequencies: Frequencies, theta: float, length: Length) -> Frequencies:
        half = len(frequencies)
        length = jnp.maximum(length, self.original_length)
        growth = self.factor * length / self.original_length - (self.factor - 1)
        # theta is replaced by theta * growth ** (half / (half - 1)).
        return frequencies * growth ** (-jnp.arange(half) / max(half - 1, 1))


@configurable
class LongRopeScaling(RotaryScaling):
    """LongRoPE (Ding et al. 2024): every dim has divisors of its own, for short and for long texts (Phi-3).

    Attributes:
      short_factors: divisors of the rotations in texts of up to `original_length` tokens, one per pair of dims.
      long_factors: the same in longer ones.
      original_length: tokens of the texts the model was trained on first.
      attention_factor: factor on rotated queries and on rotated keys.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    attention_factor: float = 1.0

    def __post_init__(self):
        _check_at_least_1(self, "original_length")
        short, long = len(self.short_factors), len(self.long_factors)
        if short != long:
            raise UserError(f"LongRopeScaling has {short} short_factors and {long} long_factors: give as many of each.")

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def rescale(self, frequencies: Frequencies, theta: float, length: Length) -> Frequencies:
        half, given = len(frequencies), len(self.short_factors)
        if half != given:
            raise UserError(f"LongRopeScaling has {given} factors: heads rotate {2 * half} dims, which need {half}.")
        short, long = jnp.array(self.short_factors), jnp.array(self.long_factors)
        return frequencies / jnp.where(length > self.original_length, long, short)


@configurable
class Llama3Scaling(RotaryScaling):
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
        _check_at_least_1(self, "factor", "original_length")
        if self.low_frequency_turns >= self.high_frequency_turns:
            raise UserError(
                f"Llama3Scaling.low_frequency_turns ({self.low_frequency_turns}) must be less than "
                f"high_frequency_turns ({self.high_frequency_turns})."
            )

    def rescale(self, frequencies: Frequencies, theta: float, length: Length) -> Frequencies:
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_turns, self.high_frequency_turns
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@configurable
class YarnScaling(RotaryScaling):
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
        _check_at_least_1(self, "factor", "original_length")
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"YarnScaling.beta_slow ({self.beta_slow}) must be positive and less than beta_fast ({self.beta_fast})."
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise UserError(f"YarnScaling.attention_factor is {self.attention_factor}: it must be positive, or None.")

    def check(self, theta: float) -> None:
        if theta <= 1:
            raise UserError(f"RotaryConfig.theta is {theta}: with YarnScaling it must be above 1.")

    @property
    def magnitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def rescale(self, frequencies: Frequencies, theta: float, length: Length) -> Frequencies:
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


def _check_at_least_1(scaling: RotaryScaling, *names: str) -> None:
    for name in names:
        if getattr(scaling, name) < 1:
            raise UserError(f"{type(scaling).__name__}.{name} is {getattr(scaling, name)}: it must be at least 1.")


@configurable
class RotaryConfig:
    """Rotary position embedding of queries and keys (Su et al. 2021), in the half-rotate layout of Llama.

    Attributes:
      theta: base of the geometric sequence of wavelengths.
      fraction: share of a head's dims that are rotated, the first ones (partial rotary).
      scaling: how rotations are slowed down for texts longer than those trained on; None: they are not.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: RotaryScaling | None = None

    def __post_init__(self):
        if self.theta <= 0:
            raise UserError(f"RotaryConfig.theta is {self.theta}: it must be positive.")
        if not 0 < self.fraction <= 1:
            raise UserError(f"RotaryConfig.fraction is {self.fraction}: it must be above 0 and at most 1.")
        if self.scaling is not None:
            self.scaling.check(self.theta)

    def rotated_dims(self, head_dim: int) -> int:
        """How many dims of a head are rotated: the first ones, in pairs."""
        dims = int(head_dim * self.fraction)
        if dims % 2 or not dims:
            share = f" x RotaryConfig.fraction ({self.fraction}) = {dims}" if self.fraction != 1 else ""
            raise UserError(f"head_dim is {head_dim}{share}: rotary positions need an even number of dims.")
        return dims

    def frequencies(self, half: int, length: Length) -> Frequencies:
        """Radians per position, of each pair of dims, in texts of `length` tokens."""
        frequencies = self.theta ** (-jnp.arange(half) / half)
        return frequencies if self.scaling is None else self.scaling.rescale(frequencies, self.theta, length)


class LearnedPositions(Module):
    def __init__(self, config: LearnedPositionsConfig, d_model: int, *, init: Initializer, key: PRNGKeyArray):
        shape = (config.max_length, d_model)
        self.embedding = parameter(init(key, shape, *shape), ("position", "embed"))
        self.offset = config.offset

    def __call__(self, positions: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        return constrain(self.embedding[...], None, None)[positions + self.offset]


class SinusoidalPositions(Module):
    """First half sines, second half cosines, wavelengths geometric from 2 pi to 2 pi * max_wavelength."""

    def __init__(self, config: SinusoidalPositionsConfig, d_model: int):
        self.max_wavelength, self.half = config.max_wavelength, d_model // 2

    def __call__(self, positions: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        frequencies = self.max_wavelength ** (-jnp.arange(self.half) / max(self.half - 1, 1))
        angles = positions[..., None] * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], config: RotaryConfig
) -> Float[Array, "batch length heads head_dim"]:
    """Turns each pair (x[i], x[i + dims / 2]) of the dims rotated by position * theta ** (-2 i / dims), in float32.

    A scaling changes the frequencies, and YaRN and LongRoPE the length of the result.
    """
    dims = config.rotated_dims(x.shape[-1])
    angles = positions[:, :, None, None] * config.frequencies(dims // 2, jnp.max(positions) + 1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    magnitude = 1.0 if config.scaling is None else config.scaling.magnitude
    if magnitude != 1:
        sin, cos = sin * magnitude, cos * magnitude
    first, second = jnp.split(x[..., :dims].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if dims == x.shape[-1] else jnp.concatenate([turned, x[..., dims:]], axis=-1)
