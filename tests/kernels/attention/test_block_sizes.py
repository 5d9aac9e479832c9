"""Block sizes fit lengths with little padding, and every entry of the table is sound."""

import pytest

from t5x_like.kernels.attention.block_sizes import TUNINGS, BlockSizes, tuning


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((4096, 4096), (1024, 1024, 512)),
        ((100, 77), (128, 128, 128)),
        ((1100, 640), (640, 768, 384)),
        ((1, 5000), (128, 1024, 512)),
    ],
)
def test_blocks_fit(lengths, expected):
    sizes = BlockSizes(1024, 1024, 512).fit(*lengths)
    assert (sizes.q, sizes.kv, sizes.compute) == expected


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000, 1500, 3000, 8191, 8193])
@pytest.mark.parametrize("chip", TUNINGS)
def test_little_is_padded(chip, length):
    for largest in (TUNINGS[chip].forward, TUNINGS[chip].forward_long, TUNINGS[chip].backward):
        sizes = largest.fit(length, length)
        assert sizes.q <= largest.q
        assert sizes.kv <= largest.kv
        assert sizes.compute <= largest.compute
        for block in (sizes.q, sizes.kv):
            padded = -(-length // block) * block
            assert padded <= max(length + 127, 1.25 * length)


def test_an_unknown_chip_gets_the_smallest():
    assert tuning("TPU v9") == TUNINGS["v4"]
