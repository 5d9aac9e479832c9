"""A plan as one HTML file that needs no network: memory, the timeline of a step, the search's plot."""

from collections.abc import Iterator, Sequence

from t5x_like.page import Markup, element, page, table
from t5x_like.planning.plan import Plan
from t5x_like.planning.report import duration, memory_parts, number
from t5x_like.planning.search import Result, pareto_front
from t5x_like.planning.topology import GiB

COLOURS = {
    "parameters": "#4269d0",
    "optimizer state": "#6cc5b0",
    "averaged parameters": "#97bbf5",
    "batch": "#9c6b4e",
    "padding": "#c8c8c8",
    "activations": "#a463f2",
    "gradients": "#efb118",
    "temporaries": "#ff725c",
    "program": "#9498a0",
    "compute": "#3ca951",
    "collective": "#ff725c",
}
WIDTH = 1000


def plan_page(plan: Plan, results: Sequence[Result] = ()) -> str:
    """The page of a plan; with the results of a search, also their scatter plot."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    title = f"{number(plan.num_parameters)} parameters on {plan.topology.describe()}"
    made = {"compiler": "compiled by", "quick": "memory compiled by", "model": "analytical model"}[plan.source]
    parts = [
        element("h1", title),
        element("p", f"mesh {mesh}; {number(plan.tokens_per_step)} tokens per step; {made} {plan.versions}"),
        element("h2", "Memory per device"),
        *_memory(plan),
    ]
    if plan.timing is not None:
        speed = f"{number(plan.tokens_per_second)} tokens/s" + (f", MFU {plan.mfu:.1%}" if plan.mfu else "")
        parts += [
            element("h2", f"A step: {duration(plan.seconds)} (estimated), {speed}"),
            *_timeline(plan),
            _collectives(plan),
        ]
    if any(result.plan for result in results):
        parts += [element("h2", "Search: memory and time of the candidates"), *_scatter(results)]
    return page(title, parts)


def _memory(plan: Plan) -> Iterator[Markup]:
    parts, capacity = memory_parts(plan), plan.topology.chip.memory
    whole, x, bars, rows = max(capacity, plan.memory.total), 0.0, [], []
    for name, size in parts.items():
        width = WIDTH * size / whole
        bars.append(_rectangle(x, 0, width, 40, COLOURS[name], f"{name}: {size / GiB:.2f} GiB"))
        swatch = element("span", Markup("&#9632;"), style=f"color:{COLOURS[name]}")
        kind = "exact" if name in plan.memory.exact else "estimated" if plan.source == "model" else "compiler"
        rows.append([element("td", swatch, " ", name), f"{size / GiB:.3f} GiB", element("td", kind, kind="dim")])
        x += width
    outline = element("rect", x=0, y=0, width=WIDTH, height=40, fill="none", stroke="#888")
    of = f" of {capacity / GiB:.1f}" if capacity else ""
    verdict = (" \N{EM DASH} ", element("b", "does not fit")) if plan.out_of_memory else ()
    yield _svg(40, [*bars, outline], "memory")
    yield element("p", f"{plan.memory.total / GiB:.2f}{of} GiB", *verdict)
    yield table(rows)


def _timeline(plan: Plan) -> Iterator[Markup]:
    """Computation above, collectives that nothing hides below; the names appear where the pointer rests."""
    lanes = {"compute": 0, "collective": 34}
    shapes = [
        _rectangle(
            WIDTH * s.start / plan.seconds,
            lanes[s.kind],
            max(0.4, WIDTH * s.seconds / plan.seconds),
            30,
            COLOURS[s.kind],
            f"{s.name}: {duration(s.seconds)}",
        )
        for s in plan.timing.timeline
    ]
    anchors = ("start", "middle", "middle", "middle", "end")
    ticks = [
        element("text", duration(plan.seconds * n / 4), x=WIDTH * n / 4, y=82, text_anchor=anchor)
        for n, anchor in enumerate(anchors)
    ]
    yield _svg(86, [*shapes, *ticks], "timeline")
    note = "above: computation; below: waiting for the network. A loop shows one turn, stretched to all."
    yield element("p", note, kind="dim")


def _collectives(plan: Plan) -> Markup:
    rows = [
        (c.kind, c.axes, f"{c.count:,.0f}", f"{c.bytes / 1e9:.2f} GB", duration(c.seconds), duration(c.exposed))
        for c in plan.timing.collectives
    ]
    return table(rows, ("collective", "axes", "per step", "bytes per device", "network", "exposed"))


def _scatter(results: Sequence[Result]) -> Iterator[Markup]:
    """Memory to the right, time upwards; the front is filled."""
    shown = [r for r in results if r.plan is not None and r.plan.seconds]
    front = [id(r) for r in pareto_front(list(shown))]
    most = max(r.plan.memory.total for r in shown) * 1.05
    longest = max(r.plan.seconds for r in shown) * 1.05
    points, colour = [], COLOURS["activations"]
    for result in shown:
        x = 60 + (WIDTH - 80) * result.plan.memory.total / most
        y = 320 - 300 * result.plan.seconds / longest
        figures = f"{duration(result.plan.seconds)}, {result.plan.memory.total / GiB:.1f} GiB"
        title = element("title", f"{figures}: {', '.join(result.candidate.gin())}")
        fill = colour if id(result) in front else "none"
        points.append(
            element("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=6, fill=fill, stroke=colour, stroke_width=2)
        )
    axes = [
        element("path", d="M60 10V320H990", fill="none", stroke="#888"),
        element("text", f"{most / GiB:.0f} GiB per device", x=WIDTH - 10, y=340, text_anchor="end"),
        element("text", duration(longest), x=56, y=20, text_anchor="end"),
        element("text", 0, x=56, y=320, text_anchor="end"),
    ]
    yield _svg(350, [*axes, *points], "search")
    yield element("p", "filled: none is better in both memory and time.", kind="dim")


def _rectangle(x: float, y: float, width: float, height: float, fill: str, label: str) -> Markup:
    place = {"x": f"{x:.2f}", "y": y, "width": f"{width:.2f}", "height": height}
    return element("rect", element("title", label), **place, fill=fill)


def _svg(height: int, shapes: list[Markup], name: str) -> Markup:
    return element("svg", *shapes, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=name)
