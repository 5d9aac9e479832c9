"""What a grouped product is expected to take, for the compiler, which cannot look into a kernel."""

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array


def estimated_cost(
    expected_rows: int, matrices: Array | jax.ShapeDtypeStruct, *read: tuple[Array, int]
) -> pl.CostEstimate:
    """FLOPs and bytes of a product, of which only rows that belong to groups count.

    Args:
      expected_rows: how many of the rows those are.
      matrices: of the groups, read or written once: [g, k, n].
      read: arrays of rows, and how often each is read.
    """
    _, k, n = matrices.shape
    bytes_of_rows = sum(times * expected_rows * rows.nbytes // len(rows) for rows, times in read)
    return pl.CostEstimate(
        flops=2 * expected_rows * k * n,
        transcendentals=0,
        bytes_accessed=bytes_of_rows + matrices.size * matrices.dtype.itemsize,
    )
