"""When checkpoints are saved, and which of them stay."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from t5x_like.configurable import configurable
from t5x_like.errors import UserError

Record = Mapping[str, Any]
"""What is kept with a checkpoint: `metrics`, `manifest` and `time` (seconds since 1970)."""


@configurable
class CheckpointConfig:
    """When the state is saved, and which checkpoints stay.

    Attributes:
      save_every_steps: steps between checkpoints; the last step of a run is saved as well.
      save_every_minutes: a checkpoint is also saved when the last one is this old; None: only by steps.
      keep_last: number of newest checkpoints that stay.
      keep_every_steps: checkpoints of multiples of this step stay for good; None: none.
      keep_every_minutes: checkpoints this far apart stay for good; None: none.
      keep_best: number of checkpoints that stay for their `best_metric`, beside the others; 0: none.
      best_metric: validation metric that ranks checkpoints; one saved at a step without evaluation has no rank.
      best_mode: whether the lowest (min) or the highest (max) value is best.
      asynchronous: writes in the background, from a snapshot of the state in host memory; else training waits.
    """

    save_every_steps: int = 1000
    save_every_minutes: float | None = 15.0
    keep_last: int = 2
    keep_every_steps: int | None = None
    keep_every_minutes: float | None = None
    keep_best: int = 0
    best_metric: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    asynchronous: bool = True

    def __post_init__(self):
        least = {"save_every_steps": 1, "keep_last": 1, "keep_best": 0, "keep_every_steps": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise UserError(f"CheckpointConfig.{name} is {value}: it must be at least {limit}.")
        for name in ("save_every_minutes", "keep_every_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"CheckpointConfig.{name} is {value}: it must be above 0, or None.")
        if self.keep_every_steps is not None and self.keep_every_steps % self.save_every_steps:
            raise UserError(
                f"CheckpointConfig.keep_every_steps ({self.keep_every_steps}) is no multiple of save_every_steps "
                f"({self.save_every_steps}): most of those checkpoints would never be saved."
            )

    def kept(self, records: Mapping[int, Record]) -> set[int]:
        """The steps that stay, of all that there are with their records."""
        steps = sorted(records)
        kept = {*steps[-self.keep_last :], *self.ranked(records)[: self.keep_best]}
        if self.keep_every_steps is not None:
            kept |= {step for step in steps if step % self.keep_every_steps == 0}
        if self.keep_every_minutes is not None:
            last = -math.inf
            for step in steps:
                # The distance, whatever its sign: clocks are set back, too.
                if abs((time := records[step].get("time", 0.0)) - last) >= 60 * self.keep_every_minutes:
                    kept.add(step)
                    last = time
        return kept

    def ranked(self, records: Mapping[int, Record]) -> list[int]:
        """Steps that have the configured metric, best first; of equals the newest."""
        values = {step: record["metrics"].get(self.best_metric, math.nan) for step, record in records.items()}
        sign = 1 if self.best_mode == "min" else -1
        finite = [step for step, value in values.items() if math.isfinite(value)]
        return sorted(finite, key=lambda step: (sign * values[step], -step))
