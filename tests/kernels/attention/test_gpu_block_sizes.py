"""Block sizes of the GPU kernels fit lengths, and shared memory."""

import pytest

from t5x_like.kernels.attention.gpu_block_sizes import GPU_TUNINGS, GpuBlocks, gpu_tuning

SHARED_KIB = {"a100": 163, "h100": 227, "h200": 227, "gpu": 99}
"""Per program, from NVIDIA's CUDA programming guide, table of technical specifications per compute capability."""


@pytest.mark.parametrize(
    ("lengths", "expected"), [((4096, 4096), (128, 64)), ((100, 33), (128, 64)), ((7, 30), (16, 32))]
)
def test_blocks_fit(lengths, expected):
    blocks = GpuBlocks(128, 64, 4, 3).fit(*lengths)
    assert (blocks.q, blocks.kv) == expected


def test_the_row_is_chosen_by_the_bytes_of_a_head():
    rows = GPU_TUNINGS["h100"]
    assert gpu_tuning("h100", 2 * 64) is rows[128]
    assert gpu_tuning("h100", 2 * 80) is rows[256]
    assert gpu_tuning("h100", 4 * 256) is rows[1024]


@pytest.mark.parametrize("chip", GPU_TUNINGS)
def test_what_is_in_flight_fits_shared_memory(chip):
    """The block that stays, with its products, and one less than `stages` of those that pass by."""
    for head_bytes, tuning in GPU_TUNINGS[chip].items():
        forward, dq, dkv = tuning.forward, tuning.dq, tuning.dkv
        passing = [forward.kv * 2, dq.kv * 2, dkv.q * 2]
        staying = [forward.q, dq.q * 2, dkv.kv * 2]
        for blocks, moved, kept in zip((forward, dq, dkv), passing, staying, strict=True):
            rows = kept + moved * max(1, blocks.stages - 1)
            assert rows * head_bytes <= SHARED_KIB[chip] * 1024, (head_bytes, blocks)
