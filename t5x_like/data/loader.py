"""Batches ahead of time: threads make them on the host (Grain), and the next ones are put on devices early."""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import grain

from t5x_like.data.objectives.objective import Rows

T = TypeVar("T")


class Loader:
    """Iterates over (step, batch) of the steps from `start_step`, in order; close it when done, or use `with`.

    Its whole state is the step: to resume, start another loader there.

    Attributes:
      seconds_waited: Time spent in waiting for batches so far.
    """

    def __init__(
        self,
        batch: Callable[[int], Rows],
        start_step: int,
        num_steps: int,
        *,
        num_threads: int = 2,
        num_prefetched: int = 8,
    ):
        """Starts the threads.

        Args:
          batch: Makes the batch of a step; called from threads.
          start_step: The first step.
          num_steps: How many steps; there may be none.
          num_threads: Threads that make batches.
          num_prefetched: Batches made ahead.
        """
        steps = grain.MapDataset.range(start_step, start_step + num_steps)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_prefetched)
        self._iterator = iter(steps.map(lambda step: (step, batch(step))).to_iter_dataset(options))
        self.seconds_waited = 0.0

    def __iter__(self) -> Iterator[tuple[int, Rows]]:
        return self

    def __next__(self) -> tuple[int, Rows]:
        start = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.seconds_waited += time.perf_counter() - start

    def close(self):
        self._iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind, error, traceback):
        self.close()


def device_prefetch(
    batches: Iterable[tuple[int, Rows]], put: Callable[[Rows], T], depth: int = 2
) -> Iterator[tuple[int, T]]:
    """Yields (step, put(batch)), having put the next `depth` batches already, so that transfers hide behind compute."""
    ahead = collections.deque()
    for step, batch in batches:
        ahead.append((step, put(batch)))
        if len(ahead) > depth:
            yield ahead.popleft()
    yield from ahead
