import collections

import numpy as np
import pytest
from scipy import stats

from t5x_like.data.objectives.objective import Draws
from t5x_like.data.objectives.spans import span_counts, span_mask
from t5x_like.data.pieces import Pieces

NUM = 6000


def t5_counts(length, density, mean):
    num_noise = min(max(round(length * density), 1), length - 1)
    return num_noise, max(round(num_noise / mean), 1)


def t5_mask(rng, length, density, mean):
    """T5's random_spans_noise_mask, one mask at a time."""
    num_noise, num_spans = t5_counts(length, density, mean)

    def segment(num_items, num_segments):
        first_in_segment = rng.permutation(np.arange(num_items - 1) < num_segments - 1)
        ids = np.cumsum(np.concatenate([[0], first_in_segment]))
        return np.bincount(ids, minlength=num_segments)

    noise, text = segment(num_noise, num_spans), segment(length - num_noise, num_spans)
    return np.concatenate([[False] * t + [True] * n for t, n in zip(text, noise, strict=True)])


def masks(length, density, mean, num=NUM):
    pieces = Pieces(np.arange(num), np.full(num, length), num)
    bits = Draws(pieces, np.random.default_rng(0).integers(0, 2**63, num).astype(np.uint64)).by_token(0)
    counts = span_counts(pieces.lengths, density, mean)
    return span_mask(pieces, counts, bits).reshape(num, length)


def span_lengths(masks):
    edges = np.diff(np.pad(masks.astype(int), ((0, 0), (1, 1))), axis=1)
    begins, ends = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return ends[1] - begins[1]


@pytest.mark.parametrize(
    ("length", "density", "mean"), [(60, 0.15, 3.0), (50, 0.5, 3.0), (40, 0.5, 8.0), (7, 0.3, 1.0)]
)
def test_masks_are_distributed_as_t5s(length, density, mean):
    rng = np.random.default_rng(1)
    theirs = np.stack([t5_mask(rng, length, density, mean) for _ in range(NUM)])
    ours = masks(length, density, mean)
    assert (ours.sum(axis=1) == theirs[0].sum()).all()
    assert (ours[:, 1:] > ours[:, :-1]).sum() == (theirs[:, 1:] > theirs[:, :-1]).sum()
    p = (ours.mean(axis=0) + theirs.mean(axis=0)) / 2
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 5 * np.sqrt(2 * p * (1 - p) / NUM)).all()
    a, b = (np.bincount(span_lengths(x), minlength=length + 1) for x in (ours, theirs))
    common = a + b > 20
    # Lengths of the spans of a mask depend on each other: a loose level.
    assert stats.chi2_contingency([a[common], b[common]]).pvalue > 1e-6 if common.sum() > 1 else (a == b).all()


def test_all_masks_are_equally_likely():
    # 4 of 9 tokens in 2 spans: 4 ways to cut the text, 3 to cut the noise.
    counts = collections.Counter(tuple(mask) for mask in masks(9, 0.44, 2.0).tolist())
    assert len(counts) == 12
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_counts_are_t5s():
    lengths = np.arange(2, 700)
    for density in (0.15, 0.3, 0.5):
        for mean in (1.0, 3.0, 8.0, 64.0):
            counts = span_counts(lengths, density, mean)
            for length, *ours in zip(lengths.tolist(), *counts, strict=True):
                num_noise, num_spans = t5_counts(length, density, mean)
                # T5's would ask for more spans than there are tokens between them.
                assert ours == [num_noise, min(num_spans, length - num_noise)]


def test_extreme_lengths_and_rates():
    counts = span_counts(np.array([0, 1, 2, 3, 10]), 0.9, 1.0)
    assert counts.tokens.tolist() == [0, 0, 1, 2, 9]
    assert counts.spans.tolist() == [0, 0, 1, 1, 1]
    pieces = Pieces(np.arange(5), np.array([0, 1, 2, 3, 10]), 5)
    mask = span_mask(pieces, counts, np.arange(16).astype(np.uint64))
    assert mask.tolist() == [False] + [False, True] + [False, True, True] + [False] + [True] * 9
