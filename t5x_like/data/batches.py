"""Batches by number: pure functions of (seed, step), whichever rows of them a host reads."""

import numpy as np

from t5x_like.data.layouts import Layout, Rows, Windows
from t5x_like.data.randomness import keys, permute, random_bits

ALL = slice(None)


class ShuffledBatches:
    """Batches of training: every row once per epoch, each epoch in another order; batches may straddle epochs."""

    def __init__(self, layout: Layout, batch_size: int, seed: int):
        self.layout, self.batch_size, self.seed = layout, batch_size, seed

    def batch(self, step: int, rows: slice = ALL) -> Rows:
        """The global batch of a step (from 0), or those of its rows."""
        epoch, index = np.divmod(step * self.batch_size + np.arange(self.batch_size)[rows], self.layout.num_rows)
        return self.layout.read(permute(index, keys(self.seed, epoch), self.layout.num_rows))


class RandomWindows:
    """Batches of windows that start anywhere, drawn uniformly with replacement (as nanoGPT): there are no epochs."""

    def __init__(self, layout: Windows, batch_size: int, seed: int):
        self.layout, self.batch_size, self.seed = layout, batch_size, seed

    def batch(self, step: int, rows: slice = ALL) -> Rows:
        """The global batch of a step (from 0), or those of its rows."""
        row = np.arange(self.batch_size, dtype=np.uint64)[rows]
        num_starts = len(self.layout.stream) - self.layout.length
        start = random_bits(keys(self.seed, np.array([step])), row) % np.uint64(num_starts)
        return self.layout.read_from(start.astype(np.int64))


class OrderedBatches:
    """All rows once, in order, for evaluation; the last batch is filled with rows without targets."""

    def __init__(self, layout: Layout, batch_size: int):
        self.layout, self.batch_size = layout, batch_size
        self.num_batches = -(-layout.num_rows // batch_size)
        self.num_targets = layout.num_targets

    def batch(self, number: int, rows: slice = ALL) -> Rows:
        """The batch of a number from 0 to `num_batches` - 1, or those of its rows."""
        return self.layout.read(number * self.batch_size + np.arange(self.batch_size)[rows])
