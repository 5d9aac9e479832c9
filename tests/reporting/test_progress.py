"""Progress: lines in a file, one line in a terminal of any width."""

import io
import re
import sys

import pytest
from absl import logging
from rich.console import Console

from t5x_like.reporting.progress import Progress, _duration, _short

NUMBERS = {"loss": 1.88123, "validation_loss": 1.9, "tokens_per_second": 12345.6, "mfu": 0.4123, "waiting": 0.123}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={})


def rendered(progress, width):
    console = terminal(width)
    console.print(progress)
    return console.file.getvalue()


def test_lines_where_there_is_no_terminal():
    file, clock = io.StringIO(), Clock()
    with Progress(2000, start_step=1000, console=Console(file=file, _environ={}), clock=clock) as progress:
        clock.now += 60  # compiles
        progress.advance(1001)
        clock.now += 99
        progress.report(1100, **NUMBERS)
        progress.report(1100, validation_loss=1.85)
        clock.now += 900
        progress.report(2000, loss=1.5)
    assert file.getvalue().splitlines() == [
        "step 1,100/2,000  55%  loss 1.8812  val 1.9000  12.3k tok/s  MFU 41.2%  15:00 left  waiting for data 12%",
        "step 1,100/2,000  55%  val 1.8500  15:00 left",
        "step 2,000/2,000 100%  loss 1.5000  took 17:39",
    ]


def test_unknown_mfu_and_short_waits_are_not_shown():
    file = io.StringIO()
    Progress(10, console=Console(file=file, _environ={})).report(1, loss=2.0, mfu=None, waiting=0.04)
    assert file.getvalue() == "step  1/10  10%  loss 2.0000\n"


def test_a_disabled_display_shows_nothing():
    for console in (Console(file=io.StringIO(), _environ={}), terminal(80)):
        with Progress(10, enabled=False, console=console) as progress:
            progress.report(5, **NUMBERS)
        assert console.file.getvalue() == ""


@pytest.mark.parametrize("width", [1, 5, 9, 20, 40, 60, 80, 200])
def test_the_bar_is_one_line_of_any_width_with_the_loss_first(width):
    progress = Progress(2000, console=terminal(width), clock=Clock())
    progress.report(1000, **NUMBERS)
    (line,) = rendered(progress, width).splitlines()
    assert len(line) <= width
    assert ("loss 1.8812" in line) == (width >= 24)
    assert ("MFU 41.2%" in line) == (width >= 60)
    assert ("waiting for data 12%" in line) == (width >= 200)
    assert ("━" * 8 in line) == (width >= 80)


def test_the_bar_keeps_the_latest_numbers_and_counts_down():
    clock = Clock()
    progress = Progress(100, console=terminal(80), clock=clock)
    progress.report(10, loss=3.0)
    clock.now += 10
    progress.advance(20)
    clock.now += 5
    line = rendered(progress, 80)
    assert "20/100  loss 3.0000  1:15 left" in line
    assert 4 <= line.count("━") <= 40


def test_log_lines_stand_above_the_bar_and_the_log_gets_its_stream_back():
    handler = logging.get_absl_handler().python_handler
    stream, console = handler.stream, terminal(60)
    with Progress(10, console=console) as progress:
        progress.report(5, loss=2.0)
        handler.stream.write("saved a checkpoint\n")
        assert handler.stream is sys.stderr is not stream
    assert handler.stream is stream
    text = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", console.file.getvalue())
    assert text.index("saved a checkpoint\n") < text.rindex("loss 2.0000")


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (999.6, "1k"), (12345, "12.3k"), (1.2e6, "1.2M"), (3.45e9, "3.45G")]
)
def test_short_numbers(number, text):
    assert _short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (185, "3:05"), (7385, "2:03:05"), (93780, "1d 02:03")]
)
def test_durations(seconds, text):
    assert _duration(seconds) == text
