"""Block sizes of the GPU kernels fit lengths, and shared memory."""

import jax.numpy as jnp
import pytest

from t5x_like.kernels.attention.gpu_block_sizes import FLOAT32, GPU_TUNINGS, GpuBlocks, gpu_tuning

SHARED_KIB = {"a100": 163, "h100": 227, "h200": 227, "gpu": 99}
"""Per program, from NVIDIA's CUDA programming guide, table of technical specifications per compute capability."""


@pytest.mark.parametrize(
    ("lengths", "expected"), [((4096, 4096), (128, 64)), ((100, 33), (128, 64)), ((7, 30), (16, 32))]
)
def test_blocks_fit(lengths, expected):
    blocks = GpuBlocks(128, 64, 4, 3).fit(*lengths)
    assert (blocks.q, blocks.kv) == expected


def test_the_row_is_chosen_by_head_dim_and_dtype():
    rows = GPU_TUNINGS["h100"]
    assert gpu_tuning("h100", 64, jnp.bfloat16) is rows[64]
    assert gpu_tuning("h100", 80, jnp.float16) is rows[128]
    assert gpu_tuning("h100", 192, jnp.bfloat16) is rows[256]
    assert gpu_tuning("h100", 64, jnp.float32) is FLOAT32


CASES = [(chip, 2 * head_dim, tuning) for chip, rows in GPU_TUNINGS.items() for head_dim, tuning in rows.items()]


@pytest.mark.parametrize(("chip", "head_bytes", "tuning"), [*CASES, ("gpu", 4 * 256, FLOAT32)])
def test_what_is_in_flight_fits_shared_memory(chip, head_bytes, tuning):
    """The block that stays, and one less than `stages` of those that pass by."""
    forward, dq, dkv = tuning.forward, tuning.dq, tuning.dkv
    staying, passing = [forward.q, 2 * dq.q, 2 * dkv.kv], [2 * forward.kv, 2 * dq.kv, 2 * dkv.q]
    for blocks, kept, moved in zip((forward, dq, dkv), staying, passing, strict=True):
        rows = kept + moved * max(1, blocks.stages - 1)
        assert rows * head_bytes <= SHARED_KIB[chip] * 1024, blocks
