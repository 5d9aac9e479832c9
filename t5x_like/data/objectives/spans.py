"""Spans of noise: which tokens of a piece are noise, and the sequences that leave them out and spell them out."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt64

from t5x_like.data.layouts import Text
from t5x_like.data.objectives.objective import order_within
from t5x_like.data.pieces import Pieces, Ragged, constant, join, select


class SpanCounts(NamedTuple):
    """How much of each piece is noise: `tokens`, in so many `spans`."""

    tokens: Int64[np.ndarray, "pieces"]
    spans: Int64[np.ndarray, "pieces"]


def span_counts(
    lengths: Int64[np.ndarray, "pieces"],
    noise_density: Float[np.ndarray, "pieces"] | float,
    mean_noise_span_length: Float[np.ndarray, "pieces"] | float,
) -> SpanCounts:
    """Counts of noise by length, as T5's `random_spans_noise_mask`: at least one token, never all; none of a single."""
    usable = np.maximum(lengths, 2)
    tokens = np.clip(np.round(usable * noise_density).astype(np.int64), 1, usable - 1)
    spans = np.maximum(np.round(tokens / mean_noise_span_length).astype(np.int64), 1)
    # Noise alternates with text: there must be some of each for every span.
    spans = np.minimum(spans, np.minimum(tokens, usable - tokens))
    return SpanCounts(np.where(lengths > 1, tokens, 0), np.where(lengths > 1, spans, 0))


def span_mask(pieces: Pieces, counts: SpanCounts, bits: UInt64[np.ndarray, "tokens"]) -> Bool[np.ndarray, "tokens"]:
    """True for noise: text and noise alternate, text first, all such masks being equally likely (T5).

    The text of a piece, and its noise, is cut into `spans` segments at places chosen among all, then they interleave.
    """
    # Of n tokens take the first as those of text, the others as those of noise: two groups of items to cut.
    is_noise = pieces.position >= (pieces.lengths - counts.tokens)[pieces.of]
    group = 2 * pieces.of + is_noise
    sizes = np.stack([pieces.lengths - counts.tokens, counts.tokens], axis=1).reshape(-1)
    begins = (np.cumsum(sizes) - sizes)[group]
    items = np.arange(len(group))
    # A segment starts at the first item of a group, and at the others that the smallest bits fall on.
    bits = np.where(items == begins, np.uint64(0), bits)
    rank = np.empty_like(items)
    rank[order_within(group, bits)] = items - begins
    starts = rank < counts.spans[pieces.of]
    starts_before = np.cumsum(starts)
    segment = starts_before - starts_before[begins]
    # Interleaved, segments of text have even numbers and those of noise odd ones.
    num_pairs = np.maximum(counts.spans, 1)
    number = 2 * ((np.cumsum(num_pairs) - num_pairs)[pieces.of] + segment) + is_noise
    lengths = np.bincount(number, minlength=2 * num_pairs.sum())
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def span_starts(pieces: Pieces, mask: Bool[np.ndarray, "tokens"]) -> Bool[np.ndarray, "tokens"]:
    """True for the first token of each span of noise."""
    return mask & ~Ragged(pieces, mask).shifted(False)


def corrupt(
    text: Text, mask: Bool[np.ndarray, "tokens"], sentinels: Int32[np.ndarray, "sentinels"], eos: int
) -> tuple[Ragged, Ragged]:
    """The inputs, where a sentinel stands for each span of noise, and the targets, where the noise follows it.

    Sentinels are taken in order in each piece; both sequences end with eos (Raffel et al. 2020, figure 2).
    """
    pieces, tokens = text.pieces, text.tokens
    starts = span_starts(pieces, mask)
    so_far = np.cumsum(starts)
    before = np.concatenate([[0], so_far])[pieces.begins]
    sentinel = sentinels[np.maximum(so_far - before[pieces.of], 1) - 1]
    inputs = select(Ragged(pieces, np.where(starts, sentinel, tokens)), ~mask | starts)

    noise = np.flatnonzero(mask)
    first = starts[noise]
    place = np.arange(len(noise)) + np.cumsum(first)
    spelled = np.empty(len(noise) + np.count_nonzero(first), np.int32)
    spelled[place] = tokens[noise]
    spelled[place[first] - 1] = sentinel[noise[first]]
    lengths = np.bincount(pieces.of[noise], weights=1 + first, minlength=len(pieces.lengths)).astype(np.int64)
    targets = Ragged(pieces.resized(lengths), spelled)
    end = constant(pieces, eos)
    return join(inputs, end), join(targets, end)
