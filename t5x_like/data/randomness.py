"""Random numbers and permutations that are functions: no state, any index at once, the same on every machine.

NumPy's generators draw in sequence, and may draw other numbers in another version; data order must not.
"""

import math

import numpy as np
from jaxtyping import Float64, Int64, UInt64


def random_bits(key: UInt64[np.ndarray, "n"], counter: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """64 uniform bits for each (key, counter): SplitMix64 (Steele, Lea and Flood 2014), entered at the counter."""
    bits = key + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keys(seed: int, numbers: Int64[np.ndarray, "n"], stream: int = 0) -> UInt64[np.ndarray, "n"]:
    """An independent key for each number (an epoch, a step, a row) in each stream under a seed."""
    root = random_bits(np.array([seed], np.uint64), np.array([stream], np.uint64))
    return random_bits(root, numbers.astype(np.uint64))


def uniform(bits: UInt64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """A number from 0 to 1, without 1, for uniform bits."""
    return (bits >> np.uint64(11)) * 2.0**-53


def below(bits: UInt64[np.ndarray, "n"], limit: Int64[np.ndarray, "n"] | int) -> Int64[np.ndarray, "n"]:
    """A uniform integer from 0 to `limit` - 1, for uniform bits."""
    return (bits % np.asarray(limit, np.uint64)).astype(np.int64)


def permute(index: Int64[np.ndarray, "n"], key: UInt64[np.ndarray, "n"], size: int) -> Int64[np.ndarray, "n"]:
    """Where `index` stands in the random permutation of `range(size)` that `key` names; each index has its own key.

    A Feistel network (Luby and Rackoff 1988) on the cells of a nearly square table. The few cells beyond `size` are
    walked through until the walk returns (Black and Rogaway 2002, section 3).
    """
    width = np.uint64(math.isqrt(size - 1) + 1)
    height = np.uint64(-(-size // int(width)))
    value = index.astype(np.uint64)
    outside = np.ones(index.shape, bool)
    while outside.any():
        row, column = value // width, value % width
        for round_key in range(4):
            round_keys = key + np.uint64(round_key)
            column = (column + random_bits(round_keys, row)) % width
            row = (row + random_bits(~round_keys, column)) % height
        value = np.where(outside, row * width + column, value)
        outside = value >= size
    return value.astype(np.int64)
