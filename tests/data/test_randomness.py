import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from t5x_like.data.randomness import keys, permute, random_bits


def test_bits_are_splitmix64():
    # The published sequence of seed 1234567 (https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64).
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    bits = random_bits(np.array([1234567], np.uint64), np.arange(5, dtype=np.uint64))
    assert bits.tolist() == expected


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 10**6))
def test_permute_is_a_permutation(size, seed, epoch):
    index = np.arange(size)
    image = permute(index, keys(seed, np.full(size, epoch)), size)
    assert np.array_equal(np.sort(image), index)


def test_large_sizes_stay_inside():
    size = 3 * 10**12 + 1
    index = np.array([0, 1, size - 1])
    image = permute(index, keys(0, np.zeros(3, int)), size)
    assert len(set(image.tolist())) == 3
    assert ((image >= 0) & (image < size)).all()


@pytest.mark.parametrize("size", [2, 3, 7, 30])
def test_over_epochs_places_and_neighbours_are_uniform(size):
    num_epochs = 20_000
    epoch = np.repeat(np.arange(num_epochs), size)
    image = permute(np.tile(np.arange(size), num_epochs), keys(3, epoch), size).reshape(num_epochs, size)
    for index in (0, size - 1):
        assert stats.chisquare(np.bincount(image[:, index], minlength=size)).pvalue > 1e-4
    distance = (image[:, 1] - image[:, 0]) % size
    assert stats.chisquare(np.bincount(distance, minlength=size)[1:]).pvalue > 1e-4 if size > 2 else True
    # Successive epochs know nothing of each other.
    pairs = image[:-1, 0] * size + image[1:, 0]
    assert stats.chisquare(np.bincount(pairs, minlength=size**2)).pvalue > 1e-4


def test_a_large_permutation_has_no_trend():
    size = 100_003
    image = permute(np.arange(size), keys(0, np.zeros(size, int)), size)
    assert abs(stats.pearsonr(np.arange(size), image).statistic) < 0.015
    assert abs(stats.pearsonr(image[:-1], image[1:]).statistic) < 0.015
