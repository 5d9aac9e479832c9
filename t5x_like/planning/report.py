"""A plan on one screen."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from t5x_like.planning.plan import Plan
from t5x_like.planning.remedies import Remedy
from t5x_like.planning.topology import GiB
from t5x_like.training.flops import COUNTING_RULE

COLOURS = {
    "parameters": "blue",
    "optimizer state": "cyan",
    "averaged parameters": "bright_blue",
    "batch": "white",
    "padding": "bright_black",
    "activations": "magenta",
    "gradients": "yellow",
    "temporaries": "red",
    "program": "bright_black",
}
BAR = 60


def report(plan: Plan, *, tokens: float | None, price: float | None) -> RenderableType:
    """The screen that `plan` prints.

    Args:
      plan: the plan.
      tokens: to train on, for days and cost; None: not shown.
      price: of a chip for an hour; None: no cost.
    """
    parts = [_head(plan), Text(), *_memory(plan)]
    if plan.timing is not None:
        parts += [Text(), *_time(plan), Text(), _speed(plan, tokens, price)]
    return Group(*parts, Text(), *_trust(plan))


def _head(plan: Plan) -> Text:
    all_active = plan.num_active_parameters == plan.num_parameters
    active = "" if all_active else f" ({number(plan.num_active_parameters)} active)"
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    made = {
        "compiler": f"compiled by {plan.versions} in {plan.compile_seconds:.0f} s",
        "quick": f"memory and collectives by {plan.versions}, time by the analytical model",
        "model": f"ANALYTICAL MODEL: {plan.versions or 'nothing was compiled'}",
    }[plan.source]
    rows = f"{plan.rows_per_device:g} sequence{'s' if plan.rows_per_device != 1 else ''} per device"
    return Text.assemble(
        (f"{number(plan.num_parameters)} parameters{active}", "bold"),
        f" on {plan.topology.describe()}\n",
        f"mesh {mesh}; {number(plan.tokens_per_step)} tokens per step, {rows}\n",
        (made, "dim"),
    )


def _memory(plan: Plan) -> Iterator[RenderableType]:
    memory, capacity = plan.memory, plan.topology.chip.memory
    parts = memory_parts(plan)
    of = f" of {capacity / GiB:.1f}" if capacity else ""
    unit = GiB if memory.total > GiB / 4 else 2**20
    excess = f" does not fit: {(memory.total - capacity) / GiB:.3g} GiB too much"
    verdict = Text(excess, "bold red") if plan.out_of_memory else Text(" fits", "bold green")
    total = f" per device {memory.total / GiB:.3g}{of} GiB"
    yield Text.assemble(("MEMORY", "bold"), total, verdict if capacity else "")
    yield _bar(list(parts.items()), max(capacity, memory.total))
    table = Table.grid(padding=(0, 2))
    for name, size in parts.items():
        kind = "exact" if name in memory.exact else "estimated" if plan.source == "model" else "compiler"
        what = {"activations": "activations kept for the backward pass"}.get(name, name)
        what = "activations, gradients, temporaries" if kind == "estimated" else what
        amount = f"{size / unit:,.2f} {'GiB' if unit == GiB else 'MiB'}"
        table.add_row(Text("■ ", COLOURS[name]) + what, Text(amount, justify="right"), Text(kind, "dim"))
    yield table
    large = [buffer for buffer in memory.buffers[:5] if buffer.bytes > memory.total / 1000]
    if large:
        yield Text("largest arrays beside what the step is given:", "dim")
        rows = Table.grid(padding=(0, 2))
        for buffer in large:
            size = Text(f"{buffer.bytes / unit:.2f}", justify="right")
            rows.add_row("  ", size, buffer.shape, Text(buffer.kind, COLOURS[buffer.kind]), Text(buffer.scope, "dim"))
        yield rows


def remedies_report(found: list[Remedy]) -> RenderableType:
    """Changes that make a run fit; see `remedies`."""
    if not found:
        return Text("\nNo single change was found that fits: use more chips, fewer or shorter sequences.", "bold red")
    table = Table.grid(padding=(0, 2))
    for remedy in found:
        table.add_row("  ", remedy.change, Text(f"{remedy.plan.memory.total / GiB:.1f} GiB", "dim"))
    return Group(Text("\nIt would fit with one of these:", "bold"), table)


def memory_parts(plan: Plan) -> dict[str, int]:
    """Bytes by name, exact parts first; they add up to the total."""
    memory = plan.memory
    padding = (memory.arguments or 0) - sum(memory.exact.values())
    return memory.exact | ({"padding": padding} if padding > 0 else {}) | {k: v for k, v in memory.working.items() if v}


def _time(plan: Plan) -> Iterator[RenderableType]:
    timing = plan.timing
    exposed = sum(c.exposed for c in timing.collectives)
    yield Text.assemble(("TIME", "bold"), f" per step {duration(timing.seconds)}", (" estimated", "dim"))
    yield _bar([("gradients", timing.compute), ("temporaries", exposed)], timing.seconds)
    kernels = f", of it {duration(timing.kernels)} in Pallas kernels" if timing.kernels else ""
    yield Text(f"computing {duration(timing.compute)}{kernels}; waiting for the network {duration(exposed)}")
    table = Table.grid(padding=(0, 2))
    for scope, seconds in list(timing.scopes.items())[:5]:
        share = Text(f"{seconds / timing.seconds:.0%}", justify="right")
        table.add_row("  ", share, Text(duration(seconds), justify="right"), Text(scope, "dim"))
    yield table
    yield _collectives(plan)


def _collectives(plan: Plan) -> RenderableType:
    if not plan.timing.collectives:
        return Text("no collectives")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in ("collective", "axes", "per step", "bytes", "network", "exposed", "overlapped"):
        table.add_column(header, justify="left" if header in ("collective", "axes") else "right")
    for c in plan.timing.collectives[:8]:
        overlapped = f"{c.overlapped / c.count:.0%}"
        cells = (f"{c.count:,.0f}", f"{c.bytes / 1e9:,.2f} GB", duration(c.seconds), duration(c.exposed), overlapped)
        table.add_row(c.kind, c.axes, *cells)
    return table


def _speed(plan: Plan, tokens: float | None, price: float | None) -> Text:
    per_chip = plan.tokens_per_second / plan.topology.num_chips
    recomputed = plan.hardware_flops / plan.model_flops - 1
    text = Text.assemble(
        ("SPEED", "bold"),
        f" {number(plan.tokens_per_second)} tokens/s, {number(per_chip)} per chip",
        (f", MFU {plan.mfu:.1%}" if plan.mfu is not None else ""),
        f"\nmodel {number(plan.model_flops)}FLOP per step; the hardware's matrix products "
        f"{number(plan.hardware_flops)}FLOP ({recomputed:+.0%})",
    )
    if tokens:
        text.append(f"\n{number(tokens)} tokens take {plan.days(tokens):,.1f} days")
        if price:
            text.append(f" and {plan.cost(tokens, price):,.0f} at {price:g} per chip-hour")
    return text


def _trust(plan: Plan) -> Iterator[Text]:
    """What is exact and what is not."""
    if plan.source != "model":
        yield Text("Exact: parameters, optimizer state, batch, the compiler's memory and its collectives.", "dim")
    else:
        yield Text("Exact: parameters, optimizer state, batch, model FLOPs. All else is a model of the step.", "yellow")
    if plan.timing is None:
        return
    loops = plan.timing.assumed_loops
    assumed = f" {loops} loops over keys have no fixed length and count half of them." if loops else ""
    how = (
        "the compiler's own cycles, kernels at half of the peak, the network by its bandwidth"
        if plan.source == "compiler"
        else "FLOPs at a fixed share of the peak, the network by its bandwidth"
    )
    yield Text(f"Estimated: time ({how}); input and stragglers do not count.{assumed}", "dim")
    yield Text(COUNTING_RULE, "dim")


def _bar(parts: list[tuple[str, float]], whole: float) -> Text:
    text, filled, total = Text(), 0, 0.0
    for name, size in parts:
        total += size
        end = round(BAR * min(1.0, total / whole)) if whole else 0
        text.append("█" * (end - filled), COLOURS[name])
        filled = end
    return text.append("░" * (BAR - filled), "bright_black")


def number(value: float) -> str:
    """Three digits and a unit: 8.03 B, 101 P."""
    for unit in ("", "k", "M", "B" if value < 1e12 else "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} E"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return "0"
