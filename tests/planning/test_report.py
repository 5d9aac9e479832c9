import dataclasses
import io

import pytest
from rich.console import Console

from t5x_like.planning.report import duration, memory_parts, number, report


def text(plan, **options):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report(plan, **({"tokens": None, "price": None} | options)))
    return console.export_text()


def test_a_plan_is_one_screen(tpu_plan):
    lines = text(tpu_plan, tokens=1e9, price=4.2).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


def test_the_parts_of_the_memory_add_up(tpu_plan):
    assert sum(memory_parts(tpu_plan).values()) == tpu_plan.memory.total


def test_what_is_exact_and_what_is_estimated_is_said(tpu_plan):
    shown = text(tpu_plan)
    assert "Exact: parameters, optimizer state, batch" in shown
    assert "Estimated: time" in shown
    assert "1 loops over keys have no fixed length" in shown
    assert "MFU: 6 FLOPs per token" in shown
    analytical = text(dataclasses.replace(tpu_plan, source="model"))
    assert "ANALYTICAL MODEL" in analytical
    assert "All else is a model" in analytical


def test_days_and_cost(tpu_plan):
    tokens = tpu_plan.tokens_per_second * 86400 * 10
    assert tpu_plan.cost(tokens, 2.0) == pytest.approx(10 * 24 * 8 * 2.0)
    assert "take 10.0 days and 3,840 at 2 per chip-hour" in text(tpu_plan, tokens=tokens, price=2.0)


def test_without_a_prediction_there_is_no_speed(cpu_plan):
    shown = text(cpu_plan, tokens=1e9)
    assert "MEMORY" in shown
    assert "SPEED" not in shown


@pytest.mark.parametrize(
    ("value", "shown"), [(8.03e9, "8.03 B"), (999.6, "1 k"), (12, "12"), (1.01e17, "101 P"), (15e12, "15 T")]
)
def test_numbers(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(10.06, "10.1 s"), (0.0129, "12.9 ms"), (0, "0"), (3e-6, "3 µs")])
def test_durations(seconds, shown):
    assert duration(seconds) == shown
