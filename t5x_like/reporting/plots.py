"""`loss.png`: the curves of a run."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from t5x_like.files import write_atomic
from t5x_like.reporting.metrics import read_metrics

TRAIN, VALIDATION = "#4878a8", "#d1602f"


def plot_losses(metrics_path: Path, png_path: Path) -> None:
    """Draws training loss (each record faint, their average bold) and validation loss over steps.

    Losses, in nats per token, stand on a logarithmic scale, on which a run's late progress is as visible as its start.
    The picture is replaced as a whole, so a viewer never sees half of one. Without any loss yet, none is written.

    Raises:
      UserError: if the metrics file is damaged.
    """
    records = read_metrics(metrics_path)
    curves = {split: _losses(records, split) for split in ("train", "validation")}
    if not any(len(steps) for steps, _ in curves.values()):
        return
    # Heavy to import, and global state (pyplot) is not for a library: hence here, and by its classes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_train(axes, *curves["train"])
    _draw_validation(axes, *curves["validation"])
    _decorate(axes, np.concatenate([losses for _, losses in curves.values()]))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomic(png_path, png.getvalue())


def smoothed(losses: Float[np.ndarray, "records"], share: float = 0.01) -> Float[np.ndarray, "records"]:
    """Returns the average of each record's surroundings, Gaussian weights with a deviation of `share` of all records.

    Looking to both sides it does not lag behind a falling curve, as a running average does.
    """
    deviation = max(share * len(losses), 1e-3)
    reach = min(round(3 * deviation), (len(losses) - 1) // 2)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    return np.convolve(losses, weights, "same") / np.convolve(np.ones_like(losses), weights, "same")


def _losses(records: list[dict[str, Any]], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and losses of a split's records, those without a finite positive loss left out."""
    pairs = [(record["step"], record["loss"]) for record in records if record["split"] == split and "loss" in record]
    steps, losses = np.array(pairs, dtype=float).reshape(-1, 2).T
    usable = np.isfinite(losses) & (losses > 0)
    return steps[usable], losses[usable]


def _draw_train(axes: Any, steps: np.ndarray, losses: np.ndarray) -> None:
    if not len(steps):
        return
    axes.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=0.8)
    marker = "o" if len(steps) == 1 else None
    average = smoothed(losses)
    axes.plot(steps, average, color=TRAIN, linewidth=1.8, marker=marker, label=f"train {average[-1]:.3f}")


def _draw_validation(axes: Any, steps: np.ndarray, losses: np.ndarray) -> None:
    if not len(steps):
        return
    label = f"validation {losses[-1]:.3f} (best {losses.min():.3f})"
    axes.plot(steps, losses, color=VALIDATION, linewidth=1.8, marker="o", markersize=4, label=label)


def _decorate(axes: Any, losses: np.ndarray) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = losses.min(), np.percentile(losses, 99.9)
    margin = max((high / low) ** 0.05, 1.01)
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    # A decade or more has room for 1, 2, 5, 10; less than that is nearly linear and gets evenly spaced ticks.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 10 else MaxNLocator(8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=(1, 2, 2.5, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
