"""Who does the work: processes of this machine. `beam` has the same for a cluster."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from t5x_like.errors import UserError

T = TypeVar("T")


class Engine(Protocol):
    """Runs functions that leave their results in files, so that the order and place of the work do not matter."""

    def run(self, function: Callable[[T], None], items: Sequence[T], label: str) -> None:
        """Calls the function with every item and returns when all are done; the first error ends it.

        Args:
          function: Can be pickled; calling it again for an item that is done does nothing.
          items: Can be pickled.
          label: What is being done, for people.
        """


class LocalEngine:
    """Processes of this machine, and a progress bar in a terminal; a context manager, which ends the processes."""

    def __init__(self, num_workers: int | None = None, *, console: Console | None = None):
        """Starts nothing yet.

        Args:
          num_workers: Processes; None: one for each core; 1: this process itself.
          console: Where progress is shown; standard error if None.
        """
        self._num_workers = num_workers or os.cpu_count() or 1
        self._console = console or Console(stderr=True)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def run(self, function: Callable[[T], None], items: Sequence[T], label: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        start = time.perf_counter()
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            task = progress.add_task(label, total=len(items))
            for _ in self._results(function, items):
                progress.advance(task)
        if not self._console.is_terminal:
            seconds = time.perf_counter() - start
            print(f"{label}: {len(items)} units in {seconds:.1f} s", file=self._console.file, flush=True)

    def _results(self, function: Callable[[T], None], items: Sequence[T]) -> Iterator[None]:
        if min(self._num_workers, len(items)) <= 1:
            yield from map(function, items)
            return
        if self._pool is None:
            # Fresh processes: forking one that has threads (JAX, progress) may hang.
            self._pool = ProcessPoolExecutor(self._num_workers, multiprocessing.get_context("spawn"))
        futures = [self._pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process died, most likely for want of memory: use fewer processes (--workers), or "
                "smaller documents (Reading.max_document_bytes). The same command goes on where this one stopped."
            ) from error
