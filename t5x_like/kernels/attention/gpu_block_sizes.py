"""Block sizes of the Triton kernels: a table per GPU, from recorded tunings; nothing is tuned at run time."""

from dataclasses import dataclass

import jax.numpy as jnp

SMALLEST = 16
"""Rows of the smallest tile that the matrix units take."""


@dataclass(frozen=True)
class GpuBlocks:
    """How one kernel is cut. Lengths are powers of two; a shorter length gets shorter blocks.

    Attributes:
      q: queries of a block.
      kv: keys of a block.
      warps: that work on a program, of 32 threads each.
      stages: blocks that are in flight at once.
    """

    q: int
    kv: int
    warps: int
    stages: int

    def __post_init__(self):
        assert all(size >= SMALLEST and size & (size - 1) == 0 for size in (self.q, self.kv))

    def fit(self, q_length: int, kv_length: int) -> "GpuBlocks":
        return GpuBlocks(_fit(self.q, q_length), _fit(self.kv, kv_length), self.warps, self.stages)


@dataclass(frozen=True)
class GpuTuning:
    """What the kernels use for heads of some size: the forward pass, and either half of the backward pass."""

    forward: GpuBlocks
    dq: GpuBlocks
    dkv: GpuBlocks


def _both(forward: GpuBlocks, backward: GpuBlocks) -> GpuTuning:
    return GpuTuning(forward, backward, backward)


_HOPPER = {
    64: _both(GpuBlocks(128, 64, 4, 3), GpuBlocks(64, 64, 4, 3)),
    128: _both(GpuBlocks(128, 128, 8, 3), GpuBlocks(64, 64, 4, 2)),
    # Hopper's matrix units take 64 rows, which are keys in the last kernel; with 4 warps registers would overflow.
    256: GpuTuning(GpuBlocks(128, 32, 8, 2), GpuBlocks(64, 32, 8, 2), GpuBlocks(32, 64, 8, 2)),
}
_AMPERE = {
    64: _both(GpuBlocks(128, 64, 4, 3), GpuBlocks(64, 64, 4, 2)),
    128: _both(GpuBlocks(128, 64, 8, 2), GpuBlocks(64, 32, 4, 2)),
    256: _both(GpuBlocks(64, 32, 4, 2), GpuBlocks(32, 32, 4, 2)),
}
_OTHER = {
    64: _both(GpuBlocks(64, 64, 4, 2), GpuBlocks(64, 32, 4, 2)),
    128: _both(GpuBlocks(64, 32, 4, 2), GpuBlocks(32, 32, 4, 2)),
    256: _both(GpuBlocks(32, 32, 4, 2), GpuBlocks(32, 16, 4, 2)),
}

GPU_TUNINGS: dict[str, dict[int, GpuTuning]] = {"a100": _AMPERE, "h100": _HOPPER, "h200": _HOPPER, "gpu": _OTHER}
"""By chip (see target.py), and then by the largest head_dim.

Those of Hopper GPUs are recorded tunings of other Triton kernels, changed where the compiler showed that they do not
suit these (head_dim 256, backward); all others are chosen to fit shared memory (163 KiB
on A100, 99 KiB on GPUs for workstations). An entry may be replaced before tracing. None was timed for these kernels.
"""

FLOAT32 = _both(GpuBlocks(32, 32, 4, 1), GpuBlocks(32, 16, 4, 1))
"""For float32, on every chip and for every head_dim: no matrix unit helps, and large blocks take minutes to compile."""

MOSAIC: dict[int, GpuTuning | GpuBlocks] = {
    64: GpuTuning(GpuBlocks(128, 128, 12, 3), GpuBlocks(128, 128, 12, 3), GpuBlocks(64, 128, 12, 3)),
    128: GpuTuning(GpuBlocks(128, 128, 12, 2), GpuBlocks(128, 64, 12, 2), GpuBlocks(64, 128, 12, 2)),
    256: GpuBlocks(128, 64, 12, 2),
}
"""Of the Mosaic GPU kernels, by the largest head_dim; at 256 of the forward pass alone.

Those of the forward pass are recorded tunings of another kernel. In the backward pass a warpgroup keeps the gradients
of 64 keys and of their values in registers, which at head_dim 256 would be all that it has.
"""


def gpu_tuning(chip: str, head_dim: int, dtype: jnp.dtype) -> GpuTuning:
    if dtype == jnp.float32:
        return FLOAT32
    rows = GPU_TUNINGS[chip]
    return rows[min(limit for limit in rows if head_dim <= limit)]


def mosaic_tuning(head_dim: int) -> GpuTuning | GpuBlocks:
    return MOSAIC[min(limit for limit in MOSAIC if head_dim <= limit)]


def _fit(block: int, length: int) -> int:
    """The block, or the smallest power of two that holds the length."""
    return min(block, max(SMALLEST, 1 << (length - 1).bit_length()))
