"""A plan as one HTML file that needs no network: memory, the timeline of a step, the search's plot."""

from collections.abc import Sequence
from html import escape

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
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.35em } h2 { font-size: 1.1em; margin: 1.8em 0 .4em } small, .dim { color: #666 }
svg { width: 100%; height: auto; display: block } text { font: 12px system-ui, sans-serif; fill: #222 }
table { border-collapse: collapse } td, th { padding: .15em 1.2em .15em 0; text-align: left } .n { text-align: right }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } text { fill: #ddd } .dim { color: #999 }
}
"""
WIDTH = 1000


def page(plan: Plan, results: Sequence[Result] = ()) -> str:
    """The page of a plan; with the results of a search, also their scatter plot."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    title = f"{number(plan.num_parameters)} parameters on {plan.topology.describe()}"
    made = {"compiler": "compiled by", "quick": "memory compiled by", "model": "analytical model"}[plan.source]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>mesh {escape(mesh)}; {number(plan.tokens_per_step)} tokens per step; {made} {escape(plan.versions)}</p>",
        "<h2>Memory per device</h2>",
        _memory(plan),
    ]
    if plan.timing is not None:
        speed = f"{number(plan.tokens_per_second)} tokens/s" + (f", MFU {plan.mfu:.1%}" if plan.mfu else "")
        parts += [
            f"<h2>A step: {duration(plan.seconds)} (estimated), {speed}</h2>",
            _timeline(plan),
            _collectives(plan),
        ]
    if any(result.plan for result in results):
        parts += ["<h2>Search: memory and time of the candidates</h2>", _scatter(results)]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    return f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"


def _memory(plan: Plan) -> str:
    parts, capacity = memory_parts(plan), plan.topology.chip.memory
    whole, x, bars, rows = max(capacity, plan.memory.total), 0.0, [], []
    for name, size in parts.items():
        width = WIDTH * size / whole
        label = f"{name}: {size / GiB:.2f} GiB"
        bars.append(_rectangle(x, 0, width, 40, COLOURS[name], label))
        swatch = f'<span style="color:{COLOURS[name]}">&#9632;</span>'
        kind = "exact" if name in plan.memory.exact else "estimated" if plan.source == "model" else "compiler"
        rows.append(
            f'<tr><td>{swatch} {name}</td><td class="n">{size / GiB:.3f} GiB</td><td class="dim">{kind}</td></tr>'
        )
        x += width
    outline = f'<rect x="0" y="0" width="{WIDTH}" height="40" fill="none" stroke="#888"/>'
    of = f" of {capacity / GiB:.1f}" if capacity else ""
    verdict = " &mdash; <b>does not fit</b>" if plan.out_of_memory else ""
    total = f"<p>{plan.memory.total / GiB:.2f}{of} GiB{verdict}</p>"
    return f"{_svg(40, [*bars, outline], 'memory')}{total}<table>{''.join(rows)}</table>"


def _timeline(plan: Plan) -> str:
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
    ticks = [
        f'<text x="{WIDTH * n / 4}" y="82" text-anchor="{("start", "middle", "middle", "middle", "end")[n]}">'
        f"{duration(plan.seconds * n / 4)}</text>"
        for n in range(5)
    ]
    note = "above: computation; below: waiting for the network. A loop shows one turn, stretched to all."
    return _svg(86, [*shapes, *ticks], "timeline") + f'<p class="dim">{note}</p>'


def _collectives(plan: Plan) -> str:
    rows = [
        f'<tr><td>{c.kind}</td><td>{escape(c.axes)}</td><td class="n">{c.count:,.0f}</td>'
        f'<td class="n">{c.bytes / 1e9:.2f} GB</td><td class="n">{duration(c.seconds)}</td>'
        f'<td class="n">{duration(c.exposed)}</td></tr>'
        for c in plan.timing.collectives
    ]
    names = ("collective", "axes", "per step", "bytes per device", "network", "exposed")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table>"


def _scatter(results: Sequence[Result]) -> str:
    """Memory to the right, time upwards; the front is filled."""
    shown = [r for r in results if r.plan is not None and r.plan.seconds]
    front = [id(r) for r in pareto_front(list(shown))]
    most = max(r.plan.memory.total for r in shown) * 1.05
    longest = max(r.plan.seconds for r in shown) * 1.05
    points = []
    for result in shown:
        x = 60 + (WIDTH - 80) * result.plan.memory.total / most
        y = 320 - 300 * result.plan.seconds / longest
        fill = COLOURS["activations"] if id(result) in front else "none"
        label = f"{duration(result.plan.seconds)}, {result.plan.memory.total / GiB:.1f} GiB: " + ", ".join(
            result.candidate.gin()
        )
        circle = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" stroke="{COLOURS["activations"]}" stroke-width="2">'
        )
        points.append(f"{circle}<title>{escape(label)}</title></circle>")
    axes = [
        '<path d="M60 10V320H990" fill="none" stroke="#888"/>',
        f'<text x="{WIDTH - 10}" y="340" text-anchor="end">{most / GiB:.0f} GiB per device</text>',
        f'<text x="56" y="20" text-anchor="end">{duration(longest)}</text>',
        '<text x="56" y="320" text-anchor="end">0</text>',
    ]
    return _svg(350, [*axes, *points], "search") + '<p class="dim">filled: none is better in both memory and time.</p>'


def _rectangle(x: float, y: float, width: float, height: float, fill: str, label: str) -> str:
    place = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}"'
    return f'<rect {place} fill="{fill}"><title>{escape(label)}</title></rect>'


def _svg(height: int, shapes: list[str], name: str) -> str:
    box = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}"'
    return f"<svg {box}>{''.join(shapes)}</svg>"
