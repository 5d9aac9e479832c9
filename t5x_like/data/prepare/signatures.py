"""What deduplication knows of a document: a hash of it, of its lines, and its MinHash signature (Broder 1997)."""

import functools
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8, UInt32, UInt64

from t5x_like.configurable import configurable
from t5x_like.data.prepare.word_hashes import words
from t5x_like.data.randomness import random_bits
from t5x_like.data.splits import content_hash
from t5x_like.errors import UserError

_SHINGLES_AT_ONCE = 512
_NOT_LETTERS = re.compile(r"[\W\d_]+")


@configurable
class NearDuplicates:
    """Documents are near duplicates if the Jaccard similarity of their runs of words is estimated above a threshold.

    MinHash with banding (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4): pairs that agree in a
    whole band are candidates, and those whose signatures agree often enough are near duplicates. Of documents that are
    connected by such pairs the first stays.

    Attributes:
      threshold: Smallest estimate. Its standard error at a similarity of 0.8 is 0.025 with 256 hashes: a threshold
        below the similarity that is to be found loses few pairs.
      num_words: Words in a run.
      num_bands: Bands of a signature.
      rows_per_band: Hashes in a band. A pair of similarity s is a candidate with the probability
        1 - (1 - s^rows_per_band)^num_bands: 0.997 for s = 0.8 by default, 0.85 for 0.7, 0.12 for 0.5.
    """

    threshold: float = 0.77
    num_words: int = 5
    num_bands: int = 32
    rows_per_band: int = 8

    def __post_init__(self):
        for field in ("num_words", "num_bands", "rows_per_band"):
            if getattr(self, field) < 1:
                raise UserError(f"NearDuplicates.{field}={getattr(self, field)}: must be positive.")
        if not 0 < self.threshold <= 1:
            raise UserError(f"NearDuplicates.threshold={self.threshold}: must be above 0, and at most 1.")


def signature(text: str, config: NearDuplicates) -> tuple[UInt64[np.ndarray, "bands"], UInt8[np.ndarray, "hashes"]]:
    """The keys of a document's bands, and 8 bits of each of its minimal hashes, which estimate similarity.

    Two documents agree in such bits with the probability s + (1 - s) / 256 (Li and Koenig 2010).
    """
    shingles = shingle_hashes(text, config.num_words).astype(np.uint32)
    num_hashes = config.num_bands * config.rows_per_band
    multipliers, summands = _hash_functions(num_hashes)
    minima = np.full(num_hashes, 2**32 - 1, np.uint32)
    for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
        # The smallest values are decided by the high bits of the product, which are the random ones.
        hashes = multipliers * shingles[None, start : start + _SHINGLES_AT_ONCE]
        hashes += summands
        np.minimum(minima, hashes.min(axis=1), out=minima)
    minima = minima.astype(np.uint64)
    rows = minima.reshape(config.num_bands, config.rows_per_band)
    bands = rows[:, 0]
    for column in rows.T[1:]:
        bands = random_bits(bands, column)
    return bands, random_bits(minima, np.zeros_like(minima)).astype(np.uint8)


@functools.cache
def _hash_functions(count: int) -> tuple[UInt32[np.ndarray, "hashes 1"], UInt32[np.ndarray, "hashes 1"]]:
    """Odd multipliers and summands of `x -> multiplier * x + summand` modulo 2^32."""
    numbers = np.arange(count, dtype=np.uint64)[:, None]
    multipliers, summands = (random_bits(np.array([key], np.uint64), numbers) for key in (17, 29))
    return (multipliers | np.uint64(1)).astype(np.uint32), summands.astype(np.uint32)


def shingle_hashes(text: str, num_words: int) -> UInt64[np.ndarray, "shingles"]:
    """Hashes of the runs of words of a text; a shorter text is one run."""
    found = words(text, normalized=True)
    return found.ngrams(min(num_words, max(len(found.hashes), 1)))


def line_hashes(lines: list[str], min_letters: int) -> UInt64[np.ndarray, "long_lines"]:
    """A hash of the letters, in lower case, of each line that has enough of them.

    Of Wenzek et al. 2020, https://arxiv.org/abs/1911.00359, section 3.
    """
    letters = [_NOT_LETTERS.sub("", line.lower()) for line in lines if len(line) >= min_letters]
    return np.array([content_hash(line) for line in letters if len(line) >= min_letters], np.uint64)


def without_repeated_lines(text: str, min_letters: int, kept: Iterator[bool]) -> str:
    """The text without those lines, of the ones that `line_hashes` hashes, whose turn in `kept` is false."""
    lines = []
    for line in text.split("\n"):
        long = len(line) >= min_letters and len(_NOT_LETTERS.sub("", line.lower())) >= min_letters
        if not long or next(kept):
            lines.append(line)
    return "\n".join(lines).strip("\n")
