"""Spans of noise: which tokens of a piece are noise, and the sequences that leave them out and spell them out."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt64

from t5x_like.data.layouts import Text
from t5x_like.data.objectives.objective import order_within
from t5x_like.data.pieces import Pieces, Ragged, constant, join, ragged_arange, select


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
    sizes = np.stack([pieces.lengths - counts.tokens, counts.tokens], axis=1).reshape(-1)
    group, place = ragged_arange(sizes)
    # A segment starts at the first item of a group, and at the others that the smallest bits fall on.
    rank = np.empty_like(place)
    rank[order_within(group, np.where(place == 0, np.uint64(0), bits))] = place
    num_pairs = np.maximum(counts.spans, 1)
    starts = np.flatnonzero(rank < np.repeat(np.repeat(num_pairs, 2), sizes))
    # Segments of text take the even slots, those of noise the odd ones between them.
    group = group[starts]
    _, number = ragged_arange(np.bincount(group, minlength=len(sizes)))
    slot = 2 * ((np.cumsum(num_pairs) - num_pairs)[group // 2] + number) + group % 2
    lengths = np.zeros(2 * num_pairs.sum(), np.int64)
    lengths[slot] = np.diff(starts, append=len(rank))
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
    is_start = span_starts(pieces, mask)
    starts = np.flatnonzero(is_start)
    _, number = ragged_arange(np.bincount(pieces.of[starts], minlength=len(pieces.lengths)))
    inputs = tokens.copy()
    inputs[starts] = sentinels[number]

    noise = np.flatnonzero(mask)
    is_first = is_start[noise]
    place = np.arange(len(noise)) + np.cumsum(is_first)
    spelled = np.empty(len(noise) + len(starts), np.int32)
    spelled[place] = tokens[noise]
    spelled[place[is_first] - 1] = sentinels[number]
    lengths = np.bincount(pieces.of[noise], weights=1 + is_first, minlength=len(pieces.lengths)).astype(np.int64)

    end = constant(pieces, eos)
    kept = select(Ragged(pieces, inputs), ~mask | is_start)
    return join(kept, end), join(Ragged(pieces.resized(lengths), spelled), end)
