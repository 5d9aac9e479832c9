"""Learning-rate schedules.

A schedule is built for a run of `num_steps` updates and maps the number of updates already made (0 for the first one)
to a learning rate. All of them warm up by one rule and then follow their own curve:

    step <  warmup_steps:  learning_rate * (step + 1) / (warmup_steps + 1)
    step >= warmup_steps:  curve(step - warmup_steps), which starts at learning_rate

so the first update is never of size zero, and the peak is reached at `step == warmup_steps`. Curves that end somewhere
(linear, cosine, exponential) are spread over the `num_steps - warmup_steps` updates after warmup and reach
`learning_rate * final_fraction` at `step == num_steps`, where they stay.
"""

import abc
import dataclasses
import itertools

import optax

from t5x_like.configurable import configurable
from t5x_like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """The learning rate over a run: warmup by the module's rule, then a curve of its own.

    Attributes:
      learning_rate: the peak, reached at the end of warmup.
      warmup_steps: updates of linear warmup.
    """

    learning_rate: float
    warmup_steps: int = 0

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(f"{type(self).__name__}.learning_rate must be positive, not {self.learning_rate}.")
        if self.warmup_steps < 0:
            raise UserError(f"{type(self).__name__}.warmup_steps must not be negative, but is {self.warmup_steps}.")

    @abc.abstractmethod
    def curve(self, num_steps: int) -> optax.Schedule:
        """Returns the rate by the number of updates since the end of warmup, in a run of `num_steps` updates."""

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates.

        Raises:
          UserError: if it does not fit the run.
        """
        if self.warmup_steps > num_steps:
            raise UserError(
                f"{type(self).__name__}.warmup_steps ({self.warmup_steps}) is longer than the run ({num_steps} steps): "
                "the learning rate would never reach its peak. Lower warmup_steps or raise STEPS."
            )
        curve = self.curve(num_steps)
        if self.warmup_steps == 0:
            return curve
        first = self.learning_rate / (self.warmup_steps + 1)
        warmup = optax.linear_schedule(first, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, curve], [self.warmup_steps])

    def steps_after_warmup(self, num_steps: int) -> int:
        """The number of updates after warmup, at least 1."""
        return max(1, num_steps - self.warmup_steps)

    def check_shares(self, *fields: str) -> None:
        """Refuses fields that are shares of a whole out of [0, 1]."""
        for field in fields:
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise UserError(
                    f"{type(self).__name__}.{field} is a share of the whole and must lie in [0, 1], not {value}."
                )


@configurable
class ConstantSchedule(Schedule):
    """The same learning rate from the end of warmup on."""

    def curve(self, num_steps: int) -> optax.Schedule:
        return optax.constant_schedule(self.learning_rate)


@configurable
class LinearSchedule(Schedule):
    """A straight line from the peak down to the end of the run.

    Attributes:
      final_fraction: the rate at the end of the run, as a share of the peak.
    """

    final_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_shares("final_fraction")

    def curve(self, num_steps: int) -> optax.Schedule:
        final = self.learning_rate * self.final_fraction
        return optax.linear_schedule(self.learning_rate, final, self.steps_after_warmup(num_steps))


@configurable
class CosineSchedule(Schedule):
    """Half a cosine from the peak down to the end of the run (Loshchilov and Hutter 2017, without restarts; nanoGPT's).

    Attributes:
      final_fraction: the rate at the end of the run, as a share of the peak.
    """

    final_fraction: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self.check_shares("final_fraction")

    def curve(self, num_steps: int) -> optax.Schedule:
        steps = self.steps_after_warmup(num_steps)
        return optax.cosine_decay_schedule(self.learning_rate, steps, self.final_fraction)


@configurable
class InverseSquareRootSchedule(Schedule):
    """Decay with the square root of time: `learning_rate * sqrt((warmup_steps + 1) / (step + 1))` after warmup.

    It does not depend on the length of the run, so a run can be extended (Vaswani et al. 2017, section 5.3; T5 keeps
    the rate constant where this one warms up). `warmup_steps` also sets the time scale of the decay.
    """

    def curve(self, num_steps: int) -> optax.Schedule:
        start = self.warmup_steps + 1
        return lambda step: self.learning_rate * (start / (step + start)) ** 0.5


@configurable
class ExponentialSchedule(Schedule):
    """Decay by the same factor in every step: `learning_rate * final_fraction ** progress`, progress from 0 to 1.

    Attributes:
      final_fraction: the rate at the end of the run, as a share of the peak; not 0, which no exponential reaches.
    """

    final_fraction: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        self.check_shares("final_fraction")
        if self.final_fraction == 0:
            raise UserError("ExponentialSchedule.final_fraction must not be 0: an exponential never gets there.")

    def curve(self, num_steps: int) -> optax.Schedule:
        steps, final = self.steps_after_warmup(num_steps), self.learning_rate * self.final_fraction
        return optax.exponential_decay(self.learning_rate, steps, self.final_fraction, end_value=final)


@configurable
class StepSchedule(Schedule):
    """A constant rate that is multiplied by `factor` at every boundary.

    Attributes:
      boundaries: the steps, counted from the start of the run and increasing, from which on the rate is lower; the
        first comes after warmup.
      factor: what the rate is multiplied by at each boundary.
    """

    boundaries: tuple[int, ...]
    factor: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self.check_shares("factor")
        steps = (self.warmup_steps, *self.boundaries)
        if not self.boundaries or any(a >= b for a, b in itertools.pairwise(steps)):
            raise UserError(
                f"StepSchedule.boundaries must be increasing steps after warmup_steps ({self.warmup_steps}), "
                f"not {self.boundaries}."
            )

    def curve(self, num_steps: int) -> optax.Schedule:
        if self.boundaries[-1] >= num_steps:
            raise UserError(
                f"StepSchedule.boundaries {self.boundaries} go beyond the run ({num_steps} steps): "
                "remove those boundaries or raise STEPS."
            )
        factors = {boundary - self.warmup_steps: self.factor for boundary in self.boundaries}
        return optax.piecewise_constant_schedule(self.learning_rate, factors)


@configurable
class WarmupStableDecaySchedule(Schedule):
    """Constant, then a straight line down at the end of the run (Hu et al. 2024, MiniCPM, section 4).

    Attributes:
      decay_fraction: the share of the whole run that the final decay takes.
      final_fraction: the rate at the end of the run, as a share of the peak.
    """

    decay_fraction: float = 0.2
    final_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_shares("decay_fraction", "final_fraction")

    def curve(self, num_steps: int) -> optax.Schedule:
        after_warmup = self.steps_after_warmup(num_steps)
        decay_steps = max(1, round(self.decay_fraction * num_steps))
        if decay_steps > after_warmup:
            raise UserError(
                f"WarmupStableDecaySchedule: warmup_steps ({self.warmup_steps}) and decay_fraction "
                f"({self.decay_fraction}: {decay_steps} steps) do not fit into the run ({num_steps} steps). Lower one."
            )
        final = self.learning_rate * self.final_fraction
        begin = after_warmup - decay_steps
        return optax.linear_schedule(self.learning_rate, final, decay_steps, transition_begin=begin)
