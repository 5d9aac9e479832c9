"""Ends a process that hangs: a peer that stopped without dying, a storage that never answers, a deadlock."""

import faulthandler
import sys
import time
from typing import Any, Self


class Watchdog:
    """Prints the stacks of all threads to standard error and ends the process unless it hears of progress in time.

    Python's faulthandler does both from a thread of its own in C, so it works even while another thread never lets go
    of the interpreter. The process ends with code 1, without any cleaning up that could hang as well.
    """

    def __init__(self, minutes: float | None):
        """Watches from the first `progress` on; None: never."""
        self._seconds = None if minutes is None else 60 * minutes
        self._heard = -float("inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """Tells that something was finished: the time starts anew."""
        now = time.monotonic()
        # Starting anew makes a thread: not for every step of a thousand in a second.
        if self._seconds is not None and now - self._heard > self._seconds / 100:
            self._heard = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)
