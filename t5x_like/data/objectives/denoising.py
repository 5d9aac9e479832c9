"""Denoising (BART): an encoder reads a damaged text, a decoder writes the whole."""

import dataclasses

import numpy as np
from jaxtyping import Int32, Int64

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout
from t5x_like.data.objectives.corruption import encoder_decoder_features, encoder_decoder_rows
from t5x_like.data.objectives.objective import (
    Draws,
    Features,
    Index,
    Keys,
    Objective,
    Rows,
    Transform,
    order_within,
    required_eos,
)
from t5x_like.data.objectives.spans import span_counts, span_mask, span_starts
from t5x_like.data.objectives.words import Edges, text_ids
from t5x_like.data.pieces import Ragged, constant, join, select
from t5x_like.data.randomness import below, uniform
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError


@configurable
class Denoising(Objective):
    """The targets are the text; the inputs are the text with any of these kinds of noise, in this order.

    Lewis et al. 2020, section 2.2. Both end with eos, and rows of encoder and decoder are equally long.

    Attributes:
      shuffle_sentences: puts the sentences of a piece of text in a random order.
      infilling_rate: share of the tokens that are in spans each of which one [MASK] stands for; 0: none.
      mean_span_length: tokens of such a span, on average. (Spans are drawn as for SpanCorruption; the paper draws
        their lengths from a Poisson distribution, and has empty ones too.)
      deletion_rate: share of the tokens that are left out, each by itself.
      replacement_rate: share of the tokens that become a random one, each by itself.
    """

    shuffle_sentences: bool = False
    infilling_rate: float = 0.3
    mean_span_length: float = 3.0
    deletion_rate: float = 0.0
    replacement_rate: float = 0.0

    def __post_init__(self):
        for field in ("infilling_rate", "deletion_rate", "replacement_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"Denoising.{field}={getattr(self, field)}: must be at least 0 and less than 1.")
        if self.mean_span_length < 1:
            raise UserError(f"Denoising.mean_span_length={self.mean_span_length}: must be at least 1.")
        if not (self.shuffle_sentences or self.infilling_rate or self.deletion_rate or self.replacement_rate):
            raise UserError("Denoising has no noise: set one of its rates, or shuffle_sentences.")

    def features(self, length: int, packed: bool) -> Features:
        return encoder_decoder_features(length, length)

    def costs(self, lengths: Int64[np.ndarray, "pieces"], length: int) -> Int64[np.ndarray, "pieces"]:
        return lengths + 1

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        return _Denoised(
            config=self,
            length=length,
            pad=tokenizer.pad_id or 0,
            eos=required_eos(tokenizer, "Denoising"),
            mask=tokenizer.mask_id if self.infilling_rate else None,
            text_ids=text_ids(tokenizer),
            edges=Edges(tokenizer),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Denoised:
    config: Denoising
    length: int
    pad: int
    eos: int
    mask: int | None
    text_ids: Int32[np.ndarray, "ids"]
    edges: Edges

    def __call__(self, layout: Layout, index: Index, keys: Keys) -> Rows:
        text = layout.read(index)
        end = constant(text.pieces, self.eos)
        whole = Ragged(text.pieces, text.tokens)
        damaged = self._damage(whole, Draws(text.pieces, keys))
        return encoder_decoder_rows(join(damaged, end), join(whole, end), self.length, self.length, self.pad)

    def _damage(self, text: Ragged, draws: Draws) -> Ragged:
        config, pieces = self.config, text.pieces
        tokens = self._shuffle(text, draws) if config.shuffle_sentences else text.values
        keep = np.ones(len(tokens), bool)
        if config.replacement_rate:
            random = self.text_ids[below(draws.by_token(1), len(self.text_ids))]
            tokens = np.where(uniform(draws.by_token(2)) < config.replacement_rate, random, tokens)
        if config.deletion_rate:
            keep = uniform(draws.by_token(3)) >= config.deletion_rate
        if config.infilling_rate:
            counts = span_counts(pieces.lengths, config.infilling_rate, config.mean_span_length)
            hidden = span_mask(pieces, counts, draws.by_token(4))
            starts = span_starts(pieces, hidden)
            tokens, keep = np.where(starts, self.mask, tokens), starts | (keep & ~hidden)
        return select(Ragged(pieces, tokens), keep)

    def _shuffle(self, text: Ragged, draws: Draws) -> Int32[np.ndarray, "tokens"]:
        pieces = text.pieces
        ends = Ragged(pieces, self.edges.end_sentences(text.values))
        first = np.maximum.accumulate(np.where(ends.shifted(True), np.arange(len(text.values)), 0))
        return text.values[order_within(pieces.of, draws.by_token(0)[first])]
