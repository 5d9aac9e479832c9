"""Span corruption (T5) and mixtures of denoisers (UL2): inputs with holes, and targets that fill them."""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout, Text
from t5x_like.data.objectives.causal import PACKED, TOKENS, decoder_rows, prefix_rows
from t5x_like.data.objectives.objective import (
    Draws,
    Features,
    Index,
    Keys,
    Objective,
    Rows,
    Transform,
    required_eos,
    token_features,
)
from t5x_like.data.objectives.spans import SpanCounts, corrupt, span_counts, span_mask
from t5x_like.data.pieces import Ragged, constant, join
from t5x_like.data.randomness import uniform
from t5x_like.data.tokenizers import SPECIAL_TOKENS_FIELD, Tokenizer
from t5x_like.errors import UserError


@configurable
class Denoiser:
    """One kind of noise of a mixture.

    Attributes:
      noise_density: share of the tokens that are noise.
      mean_noise_span_length: tokens of a span of noise, on average; None: the noise is one span, the end of the text,
        whose share is uniform from half to one and a half of `noise_density` (a prefix language model).
      mode: the token that tells the model which noise it meets, before the inputs; None: no such token.
      rate: how often it is chosen, relative to the others of the mixture.
    """

    noise_density: float
    mean_noise_span_length: float | None
    mode: str | None = None
    rate: float = 1.0

    def __post_init__(self):
        check_noise("Denoiser", self.noise_density, self.mean_noise_span_length)
        if not self.rate > 0:
            raise UserError(f"Denoiser.rate={self.rate}: must be positive.")

    @property
    def spread(self) -> float:
        """How far, relative to its mean, the share of noise goes up and down."""
        return 0.5 if self.mean_noise_span_length is None else 0.0

    def counts(self, lengths: Int64[np.ndarray, "pieces"], scale: float = 1.0) -> SpanCounts:
        """The noise of pieces of these lengths, its density multiplied by `scale`."""
        # A single span of noise comes behind all text: see `span_mask`.
        return span_counts(lengths, scale * self.noise_density, self.mean_noise_span_length or math.inf)

    def input_lengths(self, lengths: Int64[np.ndarray, "pieces"]) -> Int64[np.ndarray, "pieces"]:
        """The most tokens that the inputs of pieces of these lengths have, mode and eos included."""
        least = self.counts(lengths, 1 - self.spread)
        return lengths - least.tokens + least.spans + 1 + (self.mode is not None)

    def target_lengths(self, lengths: Int64[np.ndarray, "pieces"]) -> Int64[np.ndarray, "pieces"]:
        """The most tokens that the targets have, eos included."""
        most = self.counts(lengths, 1 + self.spread)
        return most.tokens + most.spans + 1

    def total_lengths(self, lengths: Int64[np.ndarray, "pieces"]) -> Int64[np.ndarray, "pieces"]:
        """The tokens of inputs and targets together."""
        return lengths + 2 * self.counts(lengths).spans + 2 + (self.mode is not None)


def check_noise(name: str, noise_density: float, mean_noise_span_length: float | None):
    if not 0 < noise_density < 1:
        raise UserError(f"{name}.noise_density={noise_density}: must be between 0 and 1.")
    if mean_noise_span_length is not None and mean_noise_span_length < 1:
        raise UserError(f"{name}.mean_noise_span_length={mean_noise_span_length}: must be at least 1.")


class Corruption(Objective):
    """What span corruption and mixtures have in common."""

    architecture: Literal["encoder_decoder", "decoder"]

    @abc.abstractmethod
    def mixture(self) -> Sequence[Denoiser]:
        """The denoisers."""

    def target_length(self, length: int) -> int:
        """Tokens of the longest targets of a row."""
        return int(self._most(Denoiser.target_lengths, np.array([self.text_length(length)]))[0])

    def features(self, length: int, packed: bool) -> Features:
        if self.architecture == "decoder":
            return token_features(length, *TOKENS, "decoder_order", *(PACKED if packed else ()))
        return encoder_decoder_features(length, self.target_length(length))

    def text_length(self, length: int) -> int:
        return self.longest(lambda tokens: int(self._row_lengths(np.array([tokens]))[0]), length)

    def costs(self, lengths: Int64[np.ndarray, "pieces"], length: int) -> Int64[np.ndarray, "pieces"]:
        costs = self._row_lengths(lengths)
        if self.architecture == "decoder":
            return costs
        # In tokens of the encoder, and so much that the targets have room in a row of the decoder.
        targets = self._most(Denoiser.target_lengths, lengths)
        return np.maximum(costs, -(-targets * length // self.target_length(length)))

    def _row_lengths(self, lengths: Int64[np.ndarray, "pieces"]) -> Int64[np.ndarray, "pieces"]:
        # The last target is no input.
        if self.architecture == "decoder":
            return self._most(Denoiser.total_lengths, lengths) - 1
        return self._most(Denoiser.input_lengths, lengths)

    def _most(self, lengths_of: Callable, lengths: Int64[np.ndarray, "pieces"]) -> Int64[np.ndarray, "pieces"]:
        return np.max([lengths_of(denoiser, lengths) for denoiser in self.mixture()], axis=0)

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        name, text_length = type(self).__name__, np.array([self.text_length(length)])
        num_spans = max(int(denoiser.counts(text_length).spans[0]) for denoiser in self.mixture())
        if num_spans > tokenizer.num_sentinels:
            raise UserError(
                f"{name} marks up to {num_spans} spans with DataConfig.sequence_length={length}, but the tokenizer has "
                f"{tokenizer.num_sentinels} sentinels: set SpecialTokens.num_sentinels={max(num_spans, 100)} "
                f"({SPECIAL_TOKENS_FIELD}), or make the spans longer."
            )
        modes = [denoiser.mode for denoiser in self.mixture() if denoiser.mode is not None]
        return _Corrupted(
            rates=np.array([denoiser.rate for denoiser in self.mixture()]),
            densities=np.array([denoiser.noise_density for denoiser in self.mixture()]),
            span_lengths=np.array([denoiser.mean_noise_span_length or math.inf for denoiser in self.mixture()]),
            spreads=np.array([denoiser.spread for denoiser in self.mixture()]),
            modes=np.array([tokenizer.special_id(mode) for mode in modes], np.int32),
            sentinels=np.array([tokenizer.sentinel(number) for number in range(num_spans)], np.int32),
            eos=required_eos(tokenizer, name),
            pad=tokenizer.pad_id or 0,
            length=length,
            target_length=self.target_length(length) if self.architecture == "encoder_decoder" else None,
            packed=packed,
        )


@configurable
class SpanCorruption(Corruption):
    """Spans of noise are left out of the inputs, a sentinel for each, and spelled out by the targets.

    Raffel et al. 2020, section 3.1.4; the lengths are those of T5's `random_spans_helper`: a row takes so much text
    that the inputs fill DataConfig.sequence_length exactly, and the decoder's rows have exactly the length of the
    targets. With a sequence of 512 and the defaults, 568 tokens become 512 and 114.

    Attributes:
      noise_density: share of the tokens that are noise.
      mean_noise_span_length: tokens of a span of noise, on average.
      architecture: `encoder_decoder`: the encoder reads the inputs, the decoder predicts the targets; `decoder`: a
        decoder alone reads the inputs as a prefix (see PrefixLM) and then predicts the targets.
    """

    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    architecture: Literal["encoder_decoder", "decoder"] = "encoder_decoder"

    def __post_init__(self):
        check_noise("SpanCorruption", self.noise_density, self.mean_noise_span_length)

    def mixture(self) -> Sequence[Denoiser]:
        return (Denoiser(noise_density=self.noise_density, mean_noise_span_length=self.mean_noise_span_length),)

    def text_length(self, length: int) -> int:
        tokens = super().text_length(length)
        # As T5: where half is noise, one token less makes the targets as long as the inputs, a round number.
        if self.noise_density == 0.5 and self.architecture == "encoder_decoder":
            [denoiser] = self.mixture()
            tokens -= int(denoiser.target_lengths(np.array([tokens]))[0] > length)
        return tokens


def _ul2_mixture() -> tuple[Denoiser, ...]:
    noise = {"[R]": ((0.15, 3.0), (0.15, 8.0)), "[S]": ((0.25, None),)}
    noise["[X]"] = ((0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0))
    return tuple(
        Denoiser(mode=mode, noise_density=density, mean_noise_span_length=span)
        for mode, settings in noise.items()
        for density, span in settings
    )


@configurable
class UL2(Corruption):
    """A mixture of denoisers, chosen at random for each piece of text (Tay et al. 2022, section 3.1.2).

    All pieces have the same length, that of the denoiser with the longest inputs: rows of the others end in padding.

    Attributes:
      denoisers: the mixture; the default is table 1 of the paper, each at the same rate: regular ([R]), sequential
        ([S]) and extreme ([X]) noise.
      architecture: as of SpanCorruption.
    """

    denoisers: tuple[Denoiser, ...] = _ul2_mixture()
    architecture: Literal["encoder_decoder", "decoder"] = "encoder_decoder"

    def __post_init__(self):
        if len({denoiser.mode is None for denoiser in self.denoisers}) != 1:
            raise UserError("UL2.denoisers: give at least one, and a Denoiser.mode either to each or to none of them.")

    def mixture(self) -> Sequence[Denoiser]:
        return self.denoisers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Corrupted:
    """The transform; `modes` is empty without mode tokens, `target_length` None for a decoder alone."""

    rates: Float64[np.ndarray, "denoisers"]
    densities: Float64[np.ndarray, "denoisers"]
    span_lengths: Float64[np.ndarray, "denoisers"]
    spreads: Float64[np.ndarray, "denoisers"]
    modes: Int32[np.ndarray, "denoisers"]
    sentinels: Int32[np.ndarray, "sentinels"]
    eos: int
    pad: int
    length: int
    target_length: int | None
    packed: bool

    def __call__(self, layout: Layout, index: Index, keys: Keys) -> Rows:
        text = layout.read(index)
        draws = Draws(text.pieces, keys)
        chosen = self._choose(draws)
        inputs, targets = corrupt(text, self._mask(text, chosen, draws), self.sentinels, self.eos)
        if len(self.modes):
            inputs = join(constant(text.pieces, self.modes[chosen]), inputs)
        if self.target_length is not None:
            return encoder_decoder_rows(inputs, targets, self.length, self.target_length, self.pad)
        whole = join(inputs, targets)
        pieces = text.pieces.resized(whole.pieces.lengths - 1)
        is_first = whole.pieces.position == 0
        is_last = whole.pieces.position == pieces.lengths[whole.pieces.of]
        return prefix_rows(
            pieces,
            whole.values[~is_last],
            whole.values[~is_first],
            inputs.pieces.lengths,
            self.length,
            self.packed,
            self.pad,
        )

    def _choose(self, draws: Draws) -> Int64[np.ndarray, "pieces"]:
        """The denoiser of each piece."""
        shares = np.cumsum(self.rates)
        return np.searchsorted(shares[:-1] / shares[-1], uniform(draws.by_piece(0)), side="right")

    def _mask(self, text: Text, chosen: Int64[np.ndarray, "pieces"], draws: Draws) -> Bool[np.ndarray, "tokens"]:
        scale = 1 + self.spreads[chosen] * (2 * uniform(draws.by_piece(1)) - 1)
        counts = span_counts(text.pieces.lengths, scale * self.densities[chosen], self.span_lengths[chosen])
        return span_mask(text.pieces, counts, draws.by_token(2))


def encoder_decoder_features(length: int, target_length: int) -> Features:
    encoder = token_features(length, "encoder_input_tokens", "encoder_segment_ids", "encoder_positions")
    return encoder | token_features(target_length, *TOKENS, *PACKED)


def encoder_decoder_rows(inputs: Ragged, targets: Ragged, length: int, target_length: int, pad: int) -> Rows:
    """Rows whose decoder starts each piece with `pad`, as T5's; its pieces have the segment ids of the encoder's."""
    return {
        "encoder_input_tokens": inputs.pieces.pad(inputs.values, length, pad),
        "encoder_segment_ids": inputs.pieces.segment_ids(length),
        "encoder_positions": inputs.pieces.positions(length),
        **decoder_rows(targets.pieces, targets.shifted(pad), targets.values, target_length, True, pad),
    }
