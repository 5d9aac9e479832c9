"""The mask's rules; what they do to attention is tested in test_reference.py."""

import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec
from t5x_like.kernels.attention.masks import allowed


def picture(mask, length=4, segment_ids=None):
    positions = (np.arange(length)[None],) * 2
    mask = np.broadcast_to(allowed(mask, positions, segment_ids), (1, length, length))
    return ["".join(".#"[int(key)] for key in row) for row in mask[0]]


def test_pictures():
    assert picture(MaskSpec()) == ["####"] * 4
    assert picture(MaskSpec(causal=True)) == ["#...", "##..", "###.", "####"]
    assert picture(MaskSpec(causal=True, window=(1, None))) == ["#...", "##..", ".##.", "..##"]
    assert picture(MaskSpec(window=(0, 1))) == ["##..", ".##.", "..##", "...#"]
    assert picture(MaskSpec(causal=True, prefix=2)) == ["##..", "##..", "###.", "####"]
    assert picture(MaskSpec(causal=True, prefix=3, window=(1, None))) == ["###.", "###.", ".##.", "..##"]
    assert picture(MaskSpec(chunk=3)) == ["###.", "###.", "###.", "...#"]
    assert picture(MaskSpec(causal=True, chunk=2)) == ["#...", "##..", "..#.", "..##"]
    segments = np.asarray([[1, 1, 2, 0]])
    assert picture(MaskSpec(), segment_ids=(segments, segments)) == ["##..", "##..", "..#.", "...."]


@pytest.mark.parametrize("window", [(-1, None), (None, -2), (1,)])
def test_an_impossible_window_is_refused(window):
    with pytest.raises(UserError, match=r"MaskSpec\.window"):
        MaskSpec(window=window)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 0}, "MaskSpec.chunk is 0"),
        ({"causal": True, "prefix": -1}, "MaskSpec.prefix is -1"),
        ({"prefix": 2}, "MaskSpec.prefix is 2 without causal"),
    ],
)
def test_other_impossible_rules_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        MaskSpec(**arguments)
