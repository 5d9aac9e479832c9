"""Ranges of key blocks: against the mask itself, and how much work they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.kernels.attention.block_sizes import TUNINGS
from t5x_like.kernels.attention.blocks import Tokens, block_ranges, consecutive, merge_batch, padded_tokens
from t5x_like.kernels.attention.masks import MaskSpec, allowed
from tests.kernels.attention.agreement import MASKS


@st.composite
def tokens(draw):
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    lengths = draw(st.sampled_from([(12, 12), (8, 20), (17, 9)]))
    positions = tuple(consecutive(int(offset), n) for offset, n in zip(rng.integers(0, 9, 2), lengths, strict=True))
    if draw(st.booleans()):
        positions = tuple(rng.integers(0, 15, (2, n)).astype(np.int32) for n in lengths)
    segment_ids = tuple(np.sort(rng.integers(0, 4, (2, n)), axis=1).astype(np.int32) for n in lengths)
    return Tokens(positions, segment_ids if draw(st.booleans()) else None)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens(), st.sampled_from(MASKS))
def test_ranges_hold_all_work_and_full_blocks_need_no_mask(tokens, mask):
    with jax.disable_jit():
        tokens = padded_tokens(tokens, 4, 2)
        ranges = block_ranges(mask, tokens, 4, 2)
    table = np.asarray(ranges.table)
    pairs = allowed(mask, tuple(map(jnp.asarray, tokens.positions)), tokens.segment_ids)
    lengths = [positions.shape[1] for positions in tokens.positions]
    blocks = np.broadcast_to(pairs, (len(table), *lengths)).reshape(len(table), lengths[0] // 4, 4, -1, 2)
    some, every = blocks.any((2, 4)), blocks.all((2, 4))
    for b, i in np.ndindex(table.shape[:2]):
        first, end, full_first, full_end = table[b, i]
        inside = np.arange(some.shape[2])
        assert not some[b, i][(inside < first) | (inside >= end)].any()
        assert every[b, i, full_first:full_end].all()
        assert end - first <= ranges.width
    merged = np.asarray(merge_batch(ranges))
    for b, i in np.ndindex(table.shape[:2]):
        if table[b, i, 0] < table[b, i, 1]:
            assert merged[i, 0] <= table[b, i, 0]
            assert table[b, i, 1] <= merged[i, 1]


def steps(mask, length, q_block, kv_block, segment_ids=None):
    """Grid steps with work, and the width of the grid."""
    positions = (consecutive(0, length),) * 2
    ranges = block_ranges(mask, Tokens(positions, segment_ids), q_block, kv_block)
    return int((ranges.table[..., 1] - ranges.table[..., 0]).sum()), ranges.width


def scores(mask, length, sizes):
    """Logits that the TPU kernels compute, those of their blocks that the mask hides included."""
    return steps(mask, length, sizes.q, sizes.kv)[0] * sizes.q * sizes.kv


@pytest.mark.parametrize("chip", TUNINGS)
def test_a_window_leaves_an_eighth_of_the_work(chip):
    """Of 1,024 tokens, at 32,768: in the blocks of the table, of each pass."""
    causal, window = MaskSpec(causal=True), MaskSpec(causal=True, window=(1024, None))
    tuning, length = TUNINGS[chip], 2**15
    for sizes in (lambda mask: tuning.forward_for(mask.span(length)), lambda mask: tuning.backward):
        assert scores(window, length, sizes(window)) * 8 <= scores(causal, length, sizes(causal))
    assert steps(causal, length, 1024, 1024) == (32 * 33 // 2, 32)
    assert steps(window, length, 1024, 1024) == (32 * 2 - 1, 2)  # the grid itself is no wider


def test_packed_rows_skip_the_blocks_of_other_documents():
    segments = np.repeat(np.arange(1, 9, dtype=np.int32), 512)[None]
    whole, _ = steps(MaskSpec(), 4096, 256, 256)
    packed, _ = steps(MaskSpec(), 4096, 256, 256, (segments, segments))
    assert whole == 16 * 16
    assert packed == 16 * 2
    padded = np.where(np.arange(4096) < 512, 1, 0)[None].astype(np.int32)
    assert steps(MaskSpec(), 4096, 256, 256, (padded, padded))[0] == 4


def test_full_blocks_of_a_causal_window_are_known():
    positions = (consecutive(0, 16),) * 2
    table = block_ranges(MaskSpec(causal=True, window=(9, None)), Tokens(positions, None), 2, 2).table
    np.testing.assert_array_equal(table[0, 6], [1, 7, 2, 6])
