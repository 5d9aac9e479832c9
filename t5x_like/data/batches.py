"""Batches by number: pure functions of (seed, step), whichever rows of them a host reads.

A batch's rows of text come from a layout; the objective makes of them what a model reads and predicts. Its noise is
keyed by the number of the row since the run began: in another epoch the same text meets other noise.
"""

import abc

import numpy as np
from jaxtyping import Int, Int64

from t5x_like.data.layouts import AllWindows, Layout
from t5x_like.data.objectives.objective import Rows, Transform
from t5x_like.data.randomness import below, keys, permute, random_bits

RowNumbers = slice | Int[np.ndarray, "rows"]
ALL = slice(None)

# Streams of random keys under one seed; 0 is the order of the rows.
TRAIN_NOISE, VALIDATION_NOISE = 1, 2


class TrainBatches(abc.ABC):
    """Batches of training, without end.

    Attributes:
      layout: The rows that they come from.
    """

    layout: Layout

    @abc.abstractmethod
    def batch(self, step: int, rows: RowNumbers = ALL) -> Rows:
        """The global batch of a step (from 0), or those of its rows."""

    def describe(self) -> list[str]:
        """Lines for a log, on where the rows come from."""
        return []

    def describe_step(self, step: int) -> list[str]:
        """Lines for a log, on what has been seen before a step."""
        return []


class ShuffledBatches(TrainBatches):
    """Batches of training: every row once per epoch, each epoch in another order; batches may straddle epochs."""

    def __init__(self, layout: Layout, transform: Transform, batch_size: int, seed: int):
        self.layout, self.transform, self.batch_size, self.seed = layout, transform, batch_size, seed

    def batch(self, step: int, rows: RowNumbers = ALL) -> Rows:
        number = row_numbers(step, self.batch_size, rows)
        together = self.layout.rows_together
        (group, place), num_groups = np.divmod(number, together), self.layout.num_rows // together
        epoch, index = np.divmod(group, num_groups)
        index = permute(index, keys(self.seed, epoch), num_groups) * together + place
        return self.transform(self.layout, index, keys(self.seed, number, TRAIN_NOISE))


class RandomWindows(TrainBatches):
    """Batches of windows that start anywhere, drawn uniformly with replacement (as nanoGPT): there are no epochs."""

    def __init__(self, layout: AllWindows, transform: Transform, batch_size: int, seed: int):
        self.layout, self.transform, self.batch_size, self.seed = layout, transform, batch_size, seed

    def batch(self, step: int, rows: RowNumbers = ALL) -> Rows:
        row = np.arange(self.batch_size, dtype=np.uint64)[rows]
        index = below(random_bits(keys(self.seed, np.array([step])), row), self.layout.num_rows)
        noise = keys(self.seed, row_numbers(step, self.batch_size, rows), TRAIN_NOISE)
        return self.transform(self.layout, index, noise)


class OrderedBatches:
    """All rows once, in order, for evaluation; the last batch is filled with rows without text.

    A row meets the same noise in every evaluation, whatever the seed and the batch size.

    Attributes:
      layouts: The layouts whose rows these are, one after the other.
    """

    def __init__(self, layout: Layout, transform: Transform, batch_size: int):
        self.layout, self.transform, self.batch_size = layout, transform, batch_size
        self.layouts = (layout,)
        self.num_batches = -(-layout.num_rows // batch_size)

    def batch(self, number: int, rows: RowNumbers = ALL) -> Rows:
        """The batch of a number from 0 to `num_batches` - 1, or those of its rows."""
        index = row_numbers(number, self.batch_size, rows)
        return self.transform(self.layout, index, keys(0, index, VALIDATION_NOISE))


def row_numbers(step: int, batch_size: int, rows: RowNumbers) -> Int64[np.ndarray, "rows"]:
    """The numbers, since the run began, of rows of a step's batch."""
    return step * batch_size + np.arange(batch_size)[rows]
