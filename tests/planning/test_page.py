"""The page's structure, and what a browser makes of it."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from t5x_like.planning.page import WIDTH, plan_page
from t5x_like.planning.report import memory_parts
from t5x_like.planning.search import Candidate, Result
from tests.browser import shown


def drawings(text):
    """The SVG pictures by name; the page is well-formed XML but for its first line and the meta tag."""
    body = text.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "").replace("&mdash;", "-")
    return {svg.get("aria-label"): svg for svg in ElementTree.fromstring(body).iter("svg")}


def test_nothing_comes_from_elsewhere(tpu_plan):
    text = plan_page(tpu_plan)
    assert not any(word in text for word in ("http", "src=", "<link", "@import", "<script", "url("))


def test_the_memory_bar_is_as_long_as_the_memory(tpu_plan):
    bars = drawings(plan_page(tpu_plan))["memory"].findall("rect")
    *parts, outline = bars
    assert len(parts) == len(memory_parts(tpu_plan))
    share = sum(float(bar.get("width")) for bar in parts) / float(outline.get("width"))
    whole = max(tpu_plan.topology.chip.memory, tpu_plan.memory.total)
    assert share == pytest.approx(tpu_plan.memory.total / whole, abs=0.02)


def test_the_timeline_shows_every_segment_within_the_step(tpu_plan):
    bars = drawings(plan_page(tpu_plan))["timeline"].findall("rect")
    assert len(bars) == len(tpu_plan.timing.timeline)
    assert max(float(bar.get("x")) + float(bar.get("width")) for bar in bars) <= WIDTH + 1
    assert any("MLP > Linear" in bar.find("title").text for bar in bars)


def test_the_scatter_plot_has_a_point_for_each_candidate(tpu_plan, request_for_cpu):
    settings = {"RunConfig.gradient_accumulation": 1, "StackConfig.remat": "full"}
    candidate = Candidate(settings, request_for_cpu, tpu_plan)
    slower = dataclasses.replace(tpu_plan, timing=dataclasses.replace(tpu_plan.timing, seconds=9.0))
    results = [Result(candidate, tpu_plan), Result(candidate, slower), Result(candidate, None, "crash")]
    points = drawings(plan_page(tpu_plan, results))["search"].findall("circle")
    assert [point.get("fill") != "none" for point in points] == [True, False]
    assert "StackConfig.remat = 'full'" in points[0].find("title").text


def test_a_plan_without_time_has_no_timeline(cpu_plan):
    assert set(drawings(plan_page(cpu_plan))) == {"memory"}


@pytest.mark.browser
def test_a_browser_shows_all_of_it(tpu_plan, tmp_path):
    import matplotlib.image

    file = tmp_path / "plan.html"
    file.write_text(plan_page(tpu_plan))
    document = shown(file, tmp_path / "picture.png")
    assert document.count("<svg") == 2
    assert "A step: " in document
    picture = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
    saturation = picture.max(axis=-1) - picture.min(axis=-1)
    assert (saturation > 0.3).mean() > 0.005, "the bars are coloured"
