"""Batches ahead of time: threads make them on the host, and the next ones are put on devices early."""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
        self._batch = batch
        self._steps = iter(range(start_step, start_step + num_steps))
        self._threads = ThreadPoolExecutor(num_threads, "batches")
        self._ahead: collections.deque[tuple[int, Future[Rows]]] = collections.deque()
        self.seconds_waited = 0.0
        for _ in range(num_prefetched):
            self._start_next()

    def _start_next(self):
        if (step := next(self._steps, None)) is not None:
            self._ahead.append((step, self._threads.submit(self._batch, step)))

    def __iter__(self) -> Iterator[tuple[int, Rows]]:
        return self

    def __next__(self) -> tuple[int, Rows]:
        if not self._ahead:
            raise StopIteration
        start, (step, future) = time.perf_counter(), self._ahead[0]
        try:
            batch = future.result()
        finally:
            self.seconds_waited += time.perf_counter() - start
        self._ahead.popleft()
        self._start_next()
        return step, batch

    def close(self):
        """Ends the threads, each after the batch that it makes just now."""
        self._ahead.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

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
