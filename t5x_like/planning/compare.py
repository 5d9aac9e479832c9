"""Sets a prediction beside what a run measured, so that one knows how far to trust the next one."""

import math
import statistics
from dataclasses import dataclass

from rich.table import Table

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.errors import UserError
from t5x_like.planning.plan import Plan
from t5x_like.planning.report import duration, number
from t5x_like.planning.topology import CHIPS, KINDS, SHAPES, known_topologies
from t5x_like.reporting.metrics import read_metrics


@dataclass(frozen=True)
class Measured:
    """What a run wrote down.

    Attributes:
      device_kind: as JAX names it.
      num_devices: of the run.
      seconds: of a step, the median over its records but the first.
      num_records: that the median is of.
      waiting: share of the time spent waiting for data.
      mfu: the median; None where the peak is not known.
    """

    device_kind: str
    num_devices: int
    seconds: float
    num_records: int
    waiting: float
    mfu: float | None


def measured(directory: RunDirectory) -> Measured:
    """Reads `config.json` and `metrics.jsonl` of a run.

    Raises:
      UserError: if there is no run, or it has not yet measured enough.
    """
    directory.require()
    devices = directory.read_config()["devices"]
    records = (
        [r for r in read_metrics(directory.metrics) if r["split"] == "train"] if directory.metrics.exists() else []
    )
    timed = [r for r in records if "seconds_per_step" in r][1:]
    if not timed:
        raise UserError(
            f"{directory.address} has fewer than two records of training with their time: train it for longer."
        )
    median = lambda name: statistics.median(r[name] for r in timed)
    mfu = median("mfu") if "mfu" in timed[0] else None
    waiting = median("waiting_for_data")
    return Measured(devices["kind"], devices["count"], median("seconds_per_step"), len(timed), waiting, mfu)


def topology_name(run: Measured) -> str:
    """The topology that a run of so many devices of a kind has most likely had.

    Raises:
      UserError: if none is known; `--topology` can name it.
    """
    name = KINDS.get(run.device_kind)
    if name is not None:
        chip = CHIPS[name]
        chips = run.num_devices // chip.devices
        if name == "cpu":
            return f"cpu:{chips}"
        if not chip.dims:
            return f"{name}:{chips}" if chips <= 8 else f"{name}:8x{chips // 8}"
        fitting = [shape for shape in SHAPES[chip.dims] if math.prod(map(int, shape.split("x"))) == chips]
        if fitting:
            return f"{name}:{fitting[0]}"
    raise UserError(
        f"{run.num_devices} devices of kind {run.device_kind!r} are no known topology: name one with --topology. Known "
        f"are:\n{known_topologies()}"
    )


def comparison(plan: Plan, run: Measured) -> Table:
    """Prediction, measurement and their ratio."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    for header in ("", "predicted", "measured", "measured / predicted"):
        table.add_column(header, justify="left" if not header else "right")
    tokens = plan.tokens_per_step / run.seconds
    rows = [
        ("step", plan.seconds, run.seconds, duration),
        ("tokens per second", plan.tokens_per_second, tokens, number),
        ("MFU", plan.mfu, run.mfu, "{:.1%}".format),
    ]
    for name, predicted, seen, show in rows:
        shown = [show(value) if value is not None else "-" for value in (predicted, seen)]
        ratio = f"{seen / predicted:.2f}" if predicted and seen else "-"
        table.add_row(name, *shown, ratio)
    table.add_row("waiting for data", "-", f"{run.waiting:.1%}", "-")
    table.caption = f"median of {run.num_records} records on {run.num_devices} x {run.device_kind}"
    return table
