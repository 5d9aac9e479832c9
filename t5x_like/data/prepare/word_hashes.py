"""Words as arrays: where they are, how long, and a 64-bit hash of each, without a loop over words.

The hash of a word is a polynomial of its bytes modulo 2^64, taken as a difference of prefix sums (Karp and Rabin 1987)
and then mixed. It is stable between machines and versions, and not meant to withstand an adversary.
"""

import functools

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from t5x_like.data.randomness import random_bits

_BASE = 0x9E3779B97F4A7C15 | 1
_BASE_INVERSE = pow(_BASE, -1, 2**64)

_BYTES = np.arange(256)
_SPACES = np.isin(_BYTES, list(b" \t\n\r\v\f"))
# Bytes of letters, digits and all that is not ASCII; an apostrophe or a hyphen ends a word.
_LETTERS = (_BYTES >= 128) | np.array([chr(byte).isalnum() for byte in range(256)])
# UTF-8 of Chinese, Japanese and Korean characters starts with these: each is a word, for want of spaces.
_IDEOGRAPHS = (_BYTES >= 0xE3) & (_BYTES <= 0xED)
_CONTINUATIONS = (_BYTES & 0xC0) == 0x80


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base and of its inverse from 0 to `size`."""
    both = []
    for base in (_BASE, _BASE_INVERSE):
        factors = np.full(size + 1, base, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors, dtype=np.uint64))
    return both[0], both[1]


_USUAL_SIZE = 2**16
_USUAL_POWERS = _powers(_USUAL_SIZE)


class Words:
    """The words of a text, in order.

    Attributes:
      hashes: One of each word; equal for equal words.
      lengths: Of each word, in characters.
    """

    hashes: UInt64[np.ndarray, "words"]
    lengths: Int64[np.ndarray, "words"]

    def __init__(self, text: str, *, normalized: bool):
        """Finds the words.

        Args:
          text: The text.
          normalized: Words are runs of letters and digits in lower case; otherwise whatever stands between spaces.
        """
        raw = np.frombuffer((text.lower() if normalized else text).encode(), np.uint8)
        starts, ends = _bounds(raw, normalized)
        characters = np.concatenate([[0], np.cumsum(~_CONTINUATIONS[raw])])
        self.lengths = characters[ends] - characters[starts]
        powers, inverses = _USUAL_POWERS if len(raw) < _USUAL_SIZE else _powers(len(raw))
        # Sums wrap around: that is the modulus.
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((raw + np.uint64(1)) * powers[: len(raw)])])
        polynomials = (sums[ends] - sums[starts]) * inverses[starts]
        self.hashes = random_bits(polynomials, self.lengths.astype(np.uint64))

    def ngrams(self, size: int) -> UInt64[np.ndarray, "ngrams"]:
        """A hash of every run of `size` words; none if there are fewer words."""
        return combine(self.hashes, size)


def combine(hashes: UInt64[np.ndarray, "n"], size: int) -> UInt64[np.ndarray, "runs"]:
    """A hash of every run of `size` hashes, which depends on their order."""
    count = max(len(hashes) - size + 1, 0)
    runs = np.zeros(count, np.uint64)
    for offset in range(size):
        runs = runs * np.uint64(_BASE) + hashes[offset : offset + count]
    return random_bits(runs, np.full(count, size, np.uint64))


@functools.lru_cache(maxsize=1)
def words(text: str, normalized: bool) -> Words:
    """The words of a text; kept until another text is asked for, as stages look at the same text one after another."""
    return Words(text, normalized=normalized)


def repeated(hashes: UInt64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Whether each hash stood earlier in the array already."""
    out = np.zeros(len(hashes), bool)
    if most_frequent(hashes) > 1:
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        out[order[1:][ordered[1:] == ordered[:-1]]] = True
    return out


def most_frequent(hashes: UInt64[np.ndarray, "n"]) -> int:
    """How often the most frequent hash occurs."""
    ordered = np.sort(hashes)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return int(np.diff(changes, prepend=0, append=len(hashes)).max(initial=0))


def _bounds(raw: np.ndarray, normalized: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and end, in bytes."""
    inside = np.zeros(len(raw) + 2, bool)
    inside[1:-1] = _LETTERS[raw] if normalized else ~_SPACES[raw]
    starts, ends = inside[1:] & ~inside[:-1], inside[:-1] & ~inside[1:]
    if normalized and (alone := _IDEOGRAPHS[raw]).any():
        place = np.flatnonzero(alone)
        starts[place] = ends[place + 3] = True
        # What precedes one ends there, and what follows one starts there, unless that is outside of words.
        ends[place] |= inside[place]
        starts[place + 3] |= inside[place + 4]
    return np.flatnonzero(starts), np.flatnonzero(ends)
