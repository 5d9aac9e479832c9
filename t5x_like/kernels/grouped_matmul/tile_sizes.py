"""Tile sizes of the grouped kernels: a table per chip and per product; nothing is tuned at run time."""

from dataclasses import dataclass

from jaxtyping import Array, Shaped

from t5x_like.kernels.tuning import LANES, split_evenly


@dataclass(frozen=True)
class TileSizes:
    """The largest tiles of one product to use; smaller arrays get smaller ones.

    Attributes:
      m: rows.
      k: columns of lhs, which are the rows of a matrix.
      n: columns of a matrix.
    """

    m: int
    k: int
    n: int


@dataclass(frozen=True)
class Tuning:
    """Tile sizes of the three products on one chip, for numbers of 2 bytes.

    Attributes:
      forward: sums over k.
      dlhs: sums over n.
      drhs: sums over m.
    """

    forward: TileSizes
    dlhs: TileSizes
    drhs: TileSizes


TPU_TUNINGS: dict[str, Tuning] = {
    "v4": Tuning(TileSizes(256, 2048, 512), TileSizes(256, 512, 2048), TileSizes(256, 512, 512)),
    "v5e": Tuning(TileSizes(512, 7168, 1024), TileSizes(512, 1024, 7168), TileSizes(512, 1024, 1024)),
    "v5p": Tuning(TileSizes(512, 7168, 512), TileSizes(512, 512, 7168), TileSizes(512, 1024, 1024)),
    "v6e": Tuning(TileSizes(512, 7168, 1024), TileSizes(512, 1024, 7168), TileSizes(512, 1024, 1024)),
    "v7x": Tuning(TileSizes(512, 7168, 512), TileSizes(512, 512, 7168), TileSizes(512, 1024, 1024)),
}
"""By chip (see attention/target.py). An entry may be replaced before tracing. No entry was timed for these kernels."""

GPU_TUNINGS: dict[str, Tuning] = {
    "gpu": Tuning(TileSizes(128, 64, 128), TileSizes(128, 128, 64), TileSizes(64, 128, 128))
}
"""The same for the Triton kernels; sizes are powers of two."""


def tpu_tuning(chip: str) -> Tuning:
    """The table's entry; a chip that is not in it gets the smallest."""
    return TPU_TUNINGS.get(chip, TPU_TUNINGS["v4"])


def gpu_tuning(chip: str) -> Tuning:
    return GPU_TUNINGS.get(chip, GPU_TUNINGS["gpu"])


def tpu_tiles(largest: TileSizes, m: int, rhs: Shaped[Array, "g k n"]) -> TileSizes:
    """Tiles for m rows and these matrices, whose dims are cut as evenly as can be, so that little is padded."""
    num_groups, k, n = rhs.shape
    most_k, most_n = largest.k, largest.n
    if rhs.dtype.itemsize == 4:  # the longer side of a matrix's tile makes room
        most_k, most_n = (most_k // 2, most_n) if most_k >= most_n else (most_k, most_n // 2)
    rows = _row_tile(m, num_groups, largest.m, LANES)
    return TileSizes(rows, split_evenly(k, most_k), split_evenly(n, most_n))


def gpu_tiles(largest: TileSizes, m: int, rhs: Shaped[Array, "g k n"]) -> TileSizes:
    """The same in powers of two; from 16 on, which is what a matrix unit takes."""
    num_groups, *dims = rhs.shape
    k, n = (min(most, max(16, _next_power(size))) for size, most in zip(dims, (largest.k, largest.n), strict=True))
    if rhs.dtype.itemsize == 4:
        k, n = (k // 2, n) if k >= n else (k, n // 2)
    return TileSizes(_row_tile(m, num_groups, largest.m, 16), k, n)


def _row_tile(m: int, num_groups: int, largest: int, smallest: int) -> int:
    """Rows of a tile: about those of an average group, as each group has a tile that is not full."""
    return max(smallest, min(largest, _next_power(-(-m // num_groups))))


def _next_power(size: int) -> int:
    return 1 << (size - 1).bit_length()
