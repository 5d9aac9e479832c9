"""Where a run's numbers go: always `metrics.jsonl`, and TensorBoard and Weights & Biases where asked.

`metrics.jsonl` holds one JSON object per line, `{"step": 10, "split": "train", "loss": 4.1713..., ...}`, with floats in
full precision (null where not finite). It is the trace of one uninterrupted run: what a killed run wrote after its last
checkpoint is removed when it is resumed.
"""

import importlib.util
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from t5x_like.checkpoints.run_directory import write_atomic
from t5x_like.errors import UserError

METRICS_FILE = "metrics.jsonl"


class Writer(Protocol):
    """One destination of metrics."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Records `values` of `split` after `step` updates."""

    def close(self) -> None:
        """Writes out what is buffered."""


class MetricsWriter:
    """Writes to `directory/metrics.jsonl` and to the side writers.

    A side writer that fails is named in the log and left out from then on; training goes on.
    """

    def __init__(self, directory: Path, *, resumed_step: int, side_writers: Mapping[str, Writer] | None = None):
        """Opens the files; of a former run's records those up to `resumed_step` (0: none) stay.

        Args:
          directory: of the run; made if missing.
          resumed_step: number of updates already made; records of later steps are removed.
          side_writers: further destinations by name, see `open_side_writers`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        _remove_records_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._side_writers = dict(side_writers or {})

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends a record of `split` after `step` updates; it is in the file when this returns."""
        record = {"step": step, "split": split, **{name: _json_number(value) for name, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._each_side_writer(lambda writer: writer.write(step, split, values))

    def close(self) -> None:
        """Closes every destination."""
        self._file.close()
        self._each_side_writer(lambda writer: writer.close())

    def _each_side_writer(self, call: Callable[[Writer], None]) -> None:
        for name, writer in list(self._side_writers.items()):
            try:
                call(writer)
            except Exception as error:
                logging.warning("%s failed and gets no more metrics of this run: %r", name, error)
                del self._side_writers[name]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file in order; null becomes nan.

    The last line may be cut short, by a run that is writing or was killed: it is left out.

    Raises:
      UserError: if another line is not a record.
    """
    return [
        {name: math.nan if value is None else value for name, value in record.items()} for _, record in _records(path)
    ]


def open_side_writers(
    directory: Path, *, resumed_step: int, tensorboard: bool, wandb_project: str | None, config: Any
) -> dict[str, Writer]:
    """Returns the writers asked for, by name; one that cannot start is left out with a warning.

    Args:
      directory: of the run; TensorBoard's events go to its folder `tensorboard`.
      resumed_step: number of updates already made; TensorBoard hides what it has of later steps.
      tensorboard: whether to write TensorBoard events.
      wandb_project: project on Weights & Biases; None for none.
      config: the run's configuration, nested dicts, for Weights & Biases.

    Raises:
      UserError: if Weights & Biases is asked for and not installed.
    """
    builders = {}
    if tensorboard:
        builders["TensorBoard"] = lambda: TensorBoardWriter(directory / "tensorboard", resumed_step)
    if wandb_project is not None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                "LoggingConfig.wandb_project needs Weights & Biases, which is not installed: "
                "pip install 't5x_like[wandb]', or set wandb_project = None."
            )
        builders["Weights & Biases"] = lambda: WandbWriter(directory, wandb_project, config)
    writers = {}
    for name, build in builders.items():
        try:
            writers[name] = build()
        except Exception as error:
            logging.warning("%s did not start and gets no metrics of this run: %r", name, error)
    return writers


class TensorBoardWriter:
    """Scalars `split/name` as TensorBoard events."""

    def __init__(self, directory: Path, resumed_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1, flush_secs=10)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", float(value), step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Scalars `split/name` on Weights & Biases; a resumed run continues its page there."""

    def __init__(self, directory: Path, project: str, config: Any):
        import wandb

        id_file = directory / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(directory),
            config=config,
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{split}/{name}": float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every complete line with the record that it holds."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"], record["split"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}:{number} is not a metrics record: {line[:80]!r}. Restore or move the file."
            ) from None
        yield line, record


def _remove_records_after(path: Path, last_step: int) -> None:
    """Rewrites the file without records of later steps and without a line cut short; all or nothing."""
    if not path.exists():
        return
    kept = [line + "\n" for line, record in _records(path) if 0 < last_step >= record["step"]]
    write_atomic(path, "".join(kept))


def _json_number(value: float) -> float | int | None:
    """Returns a Python number (arrays' scalars are accepted), or None for nan and infinities, which JSON has not."""
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None
