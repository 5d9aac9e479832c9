"""What a person sees while a run trains: a live bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from absl import logging
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

NOTABLE_WAITING = 0.05
BAR_WIDTHS = (8, 40)
GAP = "  "
STYLES = {
    "position": "bold",
    "alarms": "bold red",
    "loss": "cyan",
    "validation_loss": "magenta",
    "time": "",
    "tokens_per_second": "dim",
    "mfu": "dim",
    "waiting": "yellow",
}
"""The parts of a line with their styles, the most important first."""


class Progress:
    """A run's position and its latest numbers; a context manager.

    It takes numbers that were fetched from the devices already and never touches a device itself.

    In a terminal one line is redrawn twice a second; parts that do not fit its width are left out, the least important
    first. Elsewhere (a file, CI) every report is one line of text. Both go to standard error.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares the display of updates `start_step` to `num_steps`.

        Args:
          num_steps: length of the whole run.
          start_step: updates already made.
          enabled: False shows nothing at all.
          console: where to show it; standard error if None.
          clock: seconds since any time.
        """
        self._console = console or Console(stderr=True)
        self._num_steps = num_steps
        self._step = start_step
        self._numbers: dict[str, float] = {}
        self._alarms: Mapping[str, int] = {}
        self._clock = clock
        self._start = self._latest = clock()
        self._first: tuple[int, float] | None = None
        self._enabled = enabled
        self._live = None
        if enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            # Log lines pass through the display from here on, above the bar; absl holds on to the stream it began with.
            self._log_stream = logging.get_absl_handler().python_handler.setStream(sys.stderr)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            if self._log_stream:
                logging.get_absl_handler().python_handler.setStream(self._log_stream)
            self._live.stop()

    def advance(self, step: int) -> None:
        """Moves the bar: `step` updates are made (or on their way)."""
        self._step, self._latest = step, self._clock()
        # The first update holds the compilation, so time counts from its end.
        self._first = self._first or (step, self._latest)

    def report(
        self,
        step: int,
        *,
        loss: float | None = None,
        validation_loss: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        waiting: float | None = None,
        alarms: Mapping[str, int] | None = None,
    ) -> None:
        """Shows the numbers given; the bar keeps showing the others' latest values.

        Args:
          step: updates made.
          loss: training loss, in nats per token.
          validation_loss: in nats per token.
          tokens_per_second: of all devices.
          mfu: model FLOP/s as a share of the devices' peak; None where no peak is known.
          waiting: share of the time spent waiting for data; shown from 5 %.
          alarms: what has gone wrong in this run and how often, by name.
        """
        self.advance(step)
        given = {
            "loss": loss,
            "validation_loss": validation_loss,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "waiting": waiting,
        }
        numbers = {name: value for name, value in given.items() if value is not None}
        self._numbers = self._numbers | numbers
        self._alarms = self._alarms if alarms is None else alarms
        if self._enabled and not self._live:
            position, *rest = self._parts(numbers).values()
            line = GAP.join([f"step {position} {step / self._num_steps:4.0%}", *rest])
            print(line, file=self._console.file, flush=True)

    def _parts(self, numbers: Mapping[str, float]) -> dict[str, str]:
        """Returns the parts of a line by name, in the order in which they are shown."""
        total = f"{self._num_steps:,}"
        parts = {"position": f"{self._step:>{len(total)},}/{total}"}
        if "loss" in numbers:
            parts["loss"] = f"loss {numbers['loss']:.4f}"
        if "validation_loss" in numbers:
            parts["validation_loss"] = f"val {numbers['validation_loss']:.4f}"
        if "tokens_per_second" in numbers:
            parts["tokens_per_second"] = f"{_short(numbers['tokens_per_second'])} tok/s"
        if "mfu" in numbers:
            parts["mfu"] = f"MFU {numbers['mfu']:.1%}"
        if self._step >= self._num_steps:
            parts["time"] = f"took {_duration(self._latest - self._start)}"
        elif (left := self._seconds_left()) is not None:
            parts["time"] = f"{_duration(left)} left"
        if numbers.get("waiting", 0.0) >= NOTABLE_WAITING:
            parts["waiting"] = f"waiting for data {numbers['waiting']:.0%}"
        if alarms := [f"{name.replace('_', ' ')} {count}" for name, count in self._alarms.items() if count]:
            parts["alarms"] = ", ".join(alarms)
        return parts

    def _seconds_left(self) -> float | None:
        """Returns the time that the remaining steps take at the mean pace so far; None before there is a pace."""
        if self._first is None or self._step <= self._first[0]:
            return None
        pace = (self._latest - self._first[1]) / (self._step - self._first[0])
        return max(0.0, pace * (self._num_steps - self._step) - (self._clock() - self._latest))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        parts = self._parts(self._numbers)
        room = options.max_width - len(parts["position"])
        kept = {"position"}
        for name in STYLES:
            if name in parts and name != "position" and len(GAP + parts[name]) <= room:
                kept.add(name)
                room -= len(GAP + parts[name])
        texts = [Text(parts[name], STYLES[name], no_wrap=True, overflow="ellipsis") for name in parts if name in kept]
        if room - len(GAP) >= BAR_WIDTHS[0]:
            width = min(room - len(GAP), BAR_WIDTHS[1])
            texts.insert(0, ProgressBar(total=self._num_steps, completed=self._step, width=width))
        line = Table.grid(padding=(0, len(GAP), 0, 0), pad_edge=False)
        line.add_row(*texts)
        yield line


def _short(number: float) -> str:
    """Returns a number with three digits and a unit: 950, 12.3k, 1.2M."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _duration(seconds: float) -> str:
    """Returns seconds as 3:05, 2:03:05 or 1d 02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
