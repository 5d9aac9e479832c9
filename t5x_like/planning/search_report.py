"""What a search found, on one screen."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from t5x_like.planning.report import duration
from t5x_like.planning.search import Result, pareto_front
from t5x_like.planning.topology import GiB

SOURCES = {"compiler": "compiled", "quick": "memory compiled", "model": "model only"}


def search_report(results: list[Result]) -> RenderableType:
    """The ranked table, which of it is on the Pareto front of memory and time, and the winner's gin lines."""
    front = pareto_front(results)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for header in ("", "mesh", "microbatches", "remat", "GiB", "step", "MFU", "by"):
        table.add_column(header, justify="right" if header in ("", "microbatches", "GiB", "step", "MFU") else "left")
    for rank, result in enumerate(results, 1):
        table.add_row(*_row(rank, result), style="bold green" if rank == 1 and result.fits else None)
    parts: list[RenderableType] = [table, Text()]
    if front:
        fastest = ", ".join(f"{results.index(r) + 1}" for r in front)
        parts.append(Text(f"On the front of memory and time (none is better in both): {fastest}."))
        parts.append(Text("The first, for a run file:\n", "dim"))
        parts.append(Text("\n".join(front[0].candidate.gin())))
    else:
        parts.append(Text("None fits: use more chips, a smaller batch or shorter sequences.", "bold red"))
    failed = [result for result in results if result.plan is None]
    parts += [Text(f"{' '.join(r.candidate.gin())}: {r.error}", "yellow") for r in failed]
    return Group(*parts)


def _row(rank: int, result: Result) -> list[str]:
    settings = result.candidate.settings
    sizes = {name.partition(".")[2]: size for name, size in settings.items() if name.startswith("MeshConfig.")}
    split = ", split" if sizes.pop("split_activations", False) else ""
    mesh = (" x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "one device") + split
    cells = [f"{rank}", mesh, str(settings["RunConfig.gradient_accumulation"]), str(settings["StackConfig.remat"])]
    plan = result.plan
    if plan is None:
        return [*cells, "", "", "", "the compiler failed"]
    if not result.fits:
        return [*cells, f"{plan.memory.total / GiB:.1f}", "", "", "does not fit"]
    mfu = f"{plan.mfu:.1%}" if plan.mfu is not None else ""
    return [*cells, f"{plan.memory.total / GiB:.1f}", duration(plan.seconds), mfu, SOURCES[plan.source]]
