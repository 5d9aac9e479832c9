"""Where a run's numbers go: always `metrics.jsonl`, and TensorBoard and Weights & Biases where asked.

`metrics.jsonl` holds one JSON object per line, `{"step": 10, "split": "train", "loss": 4.1713..., ...}`, with floats in
full precision (null where not finite). It is the trace of one uninterrupted run: what a killed run wrote after its last
checkpoint is removed when it is resumed.
"""

import importlib.util
import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from t5x_like.errors import UserError
from t5x_like.files import write_atomic

METRICS_FILE = "metrics.jsonl"
RETRY_SECONDS = (0.0, 1.0, 5.0)
CLOSE_SECONDS = 30.0
QUEUED_RECORDS = 1000


class Writer(Protocol):
    """One destination of metrics."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Records `values` of `split` after `step` updates."""

    def close(self) -> None:
        """Writes out what is buffered."""


class MetricsWriter:
    """Writes to `directory/metrics.jsonl` and to the side writers, and never raises: training goes on.

    What cannot be written to the file (disk full, ...) is kept and tried again with the next record. A side writer has
    a thread of its own, so that one that hangs holds nothing up; a record that fails there thrice is left out.

    Attributes:
      failures: attempts that failed, of all destinations.
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
        # Unbuffered: what is not written is known, and stays in our hands.
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._file_failures = 0
        self._side_writers = [_Background(name, writer) for name, writer in (side_writers or {}).items()]

    @property
    def failures(self) -> int:
        return self._file_failures + sum(writer.failures for writer in self._side_writers)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends a record of `split` after `step` updates; it is in the file when this returns, if at all possible."""
        record = {"step": step, "split": split, **{name: _json_number(value) for name, value in values.items()}}
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        self._append()
        for writer in self._side_writers:
            writer.write(step, split, values)

    def close(self) -> None:
        """Closes every destination; waits for side writers, but not for ever."""
        self._append()
        self._file.close()
        for writer in self._side_writers:
            writer.close()

    def _append(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            self._file_failures += 1
            _warn_now_and_then(self._file_failures, METRICS_FILE, error)


class NoMetricsWriter:
    """For processes other than the first, which alone writes."""

    failures = 0

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _Background:
    """A side writer in a thread of its own."""

    def __init__(self, name: str, writer: Writer):
        self.failures = 0
        self._name, self._writer = name, writer
        self._records: queue.Queue[tuple[int, str, Mapping[str, float]] | None] = queue.Queue(QUEUED_RECORDS)
        # A daemon: a writer that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        try:
            self._records.put_nowait((step, split, values))
        except queue.Full as error:
            self._failed(error)

    def close(self) -> None:
        try:
            self._records.put(None, timeout=CLOSE_SECONDS)
        except queue.Full as error:
            self._failed(error)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            for wait in RETRY_SECONDS:
                time.sleep(wait)
                try:
                    self._writer.write(*record)
                    break
                except Exception as error:  # A library's errors may be anything.
                    self._failed(error)
        try:
            self._writer.close()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        _warn_now_and_then(self.failures, self._name, error)


def _warn_now_and_then(failures: int, name: str, error: Exception) -> None:
    """Logs the first, second, fourth, eighth, ... failure."""
    if failures & (failures - 1) == 0:
        logging.warning("%s failed (%d times so far), training goes on: %r", name, failures, error)


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
