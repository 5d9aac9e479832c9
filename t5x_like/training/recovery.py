"""Back to the newest checkpoint, and past the data that led to a dead end.

`rollbacks.json` lists the returns, oldest first, before training goes on. So which batch a step takes is a function of
the step and of this file, and a run killed after a rollback resumes as if it had not been.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from t5x_like.data.build import Data
from t5x_like.errors import UserError
from t5x_like.files import write_atomic
from t5x_like.training.guards import GuardConfig

REPORTED_ROWS, REPORTED_TOKENS = 64, 512


class Fault(Exception):
    """Training cannot go on from the state that it has.

    Attributes:
      step: the last step done.
      reason: what is wrong, in words.
      bad_steps: steps (counted from 0) whose data was not taken; empty if the data is not to blame.
    """

    def __init__(self, step: int, reason: str, bad_steps: range = range(0)):
        super().__init__(reason)
        self.step, self.reason, self.bad_steps = step, reason, bad_steps


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One return: to the checkpoint of `to_step`, leaving out the next `skipped_batches`."""

    to_step: int
    skipped_batches: int
    reason: str


class Recovery:
    """The rollbacks of a run: decides about the next, and knows which data each step takes."""

    def __init__(self, path: Path, config: GuardConfig):
        """Reads what the file at `path` lists.

        Raises:
          UserError: if it is damaged.
        """
        self._path, self._config = path, config
        self.rollbacks = _read(path)

    def batch_number(self, step: int) -> int:
        """Which batch a step (counted from 0) takes."""
        return step + sum(rollback.skipped_batches for rollback in self.rollbacks if rollback.to_step <= step)

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Fault if the metrics of `step` tell that too many steps in a row were skipped."""
        in_a_row = int(metrics.get("skipped_in_a_row", 0))
        if in_a_row >= self._config.rollback_after:
            raise Fault(step, f"{in_a_row} steps in a row were skipped", range(step - in_a_row, step))

    def back_to(self, step: int, fault: Fault, data: Data) -> None:
        """Records the return to the checkpoint of `step`.

        Raises:
          UserError: if there were too many returns to it.
        """
        report = self._report(fault, data) if fault.bad_steps else None
        former = sum(rollback.to_step == step for rollback in self.rollbacks)
        if former >= self._config.max_rollbacks:
            described = f" The data is described in {report}: its source is to be looked at." if report else ""
            raise UserError(
                f"After {former} returns to step {step}, training fails again: at step {fault.step}, {fault.reason}."
                f"{described} To go on regardless, raise GuardConfig.max_rollbacks."
            )
        skipped = fault.step - step if fault.bad_steps else 0
        self.rollbacks.append(Rollback(step, skipped, f"at step {fault.step}, {fault.reason}"))
        if jax.process_index() == 0:
            text = json.dumps([dataclasses.asdict(rollback) for rollback in self.rollbacks], indent=1)
            write_atomic(self._path, text + "\n")
        past = f" and past {skipped} batches" if skipped else ""
        logging.error("At step %d, %s: back to step %d%s.", fault.step, fault.reason, step, past)

    def _report(self, fault: Fault, data: Data) -> Path:
        """Writes what the first batch that was not taken holds, beside the list."""
        step = fault.bad_steps[0]
        number = self.batch_number(step)
        path = self._path.with_name(f"bad_batch_{number}.json")
        numbers = f"batches {number} to {self.batch_number(fault.bad_steps[-1])}"
        report = {
            "reason": fault.reason,
            "first bad step": step + 1,
            "data": f"{numbers} of {data.config.source}",
            "rows": described_rows(data.train.batch(number), data),
        }
        if jax.process_index() == 0:
            write_atomic(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        return path


def described_rows(batch: Mapping[str, np.ndarray], data: Data) -> list[dict[str, Any]]:
    """The tokens of a batch's first rows, by feature, as numbers and as text."""
    features = {
        name: rows[:REPORTED_ROWS, :REPORTED_TOKENS].tolist() for name, rows in batch.items() if "tokens" in name
    }
    rows = zip(*features.values(), strict=True)
    return [
        {
            name: {"tokens": tokens, "text": data.tokenizer.decode(tokens)}
            for name, tokens in zip(features, row, strict=True)
        }
        for row in rows
    ]


def _read(path: Path) -> list[Rollback]:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, list):
            raise ValueError("it is no list")
        rollbacks = [Rollback(**entry) for entry in entries]
        if not all(type(number) is int and number >= 0 for r in rollbacks for number in (r.to_step, r.skipped_batches)):
            raise ValueError("a step is no number")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): without it, it is unknown which data was left out. Bring it back, or remove "
            "it to take all data from the newest checkpoint on."
        ) from error
    return rollbacks
