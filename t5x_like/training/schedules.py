"""Learning-rate schedules.

A schedule is built for a run of `num_steps` updates and maps the number of updates already made (0 for the first one)
to a learning rate. All of them warm up by one rule and then follow their own curve:

    step <  warmup_steps:  learning_rate * (step + 1) / (warmup_steps + 1)
    step >= warmup_steps:  curve(step - warmup_steps), which starts at learning_rate

so the first update is never of size zero, and the peak is reached at `step == warmup_steps`. Curves that end somewhere
(linear, cosine, exponential) are spread over the `num_steps - warmup_steps` updates after warmup and reach
`learning_rate * final_fraction` at `step == num_steps`, where they stay.
"""

import itertools

import optax

from t5x_like.configurable import configurable
from t5x_like.errors import UserError


def _check(config, **fractions: float) -> None:
    """Refuses a learning rate, a warmup or a fraction (each in [0, 1]) out of range."""
    name = type(config).__name__
    if not config.learning_rate > 0:
        raise UserError(f"{name}.learning_rate must be positive, not {config.learning_rate}.")
    if config.warmup_steps < 0:
        raise UserError(f"{name}.warmup_steps must not be negative, but is {config.warmup_steps}.")
    for field, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}.{field} is a share of the whole and must lie in [0, 1], not {value}.")


def _after_warmup(config, num_steps: int) -> int:
    """Returns the number of updates after warmup, at least 1."""
    if config.warmup_steps > num_steps:
        raise UserError(
            f"{type(config).__name__}.warmup_steps ({config.warmup_steps}) is longer than the run ({num_steps} steps): "
            "the learning rate would never reach its peak. Lower warmup_steps or raise STEPS."
        )
    return max(1, num_steps - config.warmup_steps)


def _warm_up(config, curve: optax.Schedule) -> optax.Schedule:
    """Puts the warmup of the module's rule before `curve`, which counts its steps from the end of warmup."""
    if config.warmup_steps == 0:
        return curve
    first = config.learning_rate / (config.warmup_steps + 1)
    warmup = optax.linear_schedule(first, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, curve], [config.warmup_steps])


@configurable
class ConstantSchedule:
    """The same learning rate from the end of warmup on.

    Attributes:
      learning_rate: the rate after warmup.
      warmup_steps: updates of linear warmup.
    """

    learning_rate: float
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self)

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates."""
        _after_warmup(self, num_steps)
        return _warm_up(self, optax.constant_schedule(self.learning_rate))


@configurable
class LinearSchedule:
    """A straight line from the peak down to the end of the run.

    Attributes:
      learning_rate: the peak, reached at the end of warmup.
      warmup_steps: updates of linear warmup.
      final_fraction: the rate at the end of the run, as a share of the peak.
    """

    learning_rate: float
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self):
        _check(self, final_fraction=self.final_fraction)

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates."""
        final = self.learning_rate * self.final_fraction
        return _warm_up(self, optax.linear_schedule(self.learning_rate, final, _after_warmup(self, num_steps)))


@configurable
class CosineSchedule:
    """Half a cosine from the peak down to the end of the run (Loshchilov and Hutter 2017, without restarts; nanoGPT's).

    Attributes:
      learning_rate: the peak, reached at the end of warmup.
      warmup_steps: updates of linear warmup.
      final_fraction: the rate at the end of the run, as a share of the peak.
    """

    learning_rate: float
    warmup_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self):
        _check(self, final_fraction=self.final_fraction)

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates."""
        decay_steps = _after_warmup(self, num_steps)
        return _warm_up(self, optax.cosine_decay_schedule(self.learning_rate, decay_steps, self.final_fraction))


@configurable
class InverseSquareRootSchedule:
    """Decay with the square root of time: `learning_rate * sqrt((warmup_steps + 1) / (step + 1))` after warmup.

    It does not depend on the length of the run, so a run can be extended (Vaswani et al. 2017, section 5.3; T5 keeps
    the rate constant where this one warms up).

    Attributes:
      learning_rate: the peak, reached at the end of warmup.
      warmup_steps: updates of linear warmup; they also set the time scale of the decay.
    """

    learning_rate: float
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self)

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates."""
        _after_warmup(self, num_steps)
        start = self.warmup_steps + 1
        return _warm_up(self, lambda step: self.learning_rate * (start / (step + start)) ** 0.5)


@configurable
class ExponentialSchedule:
    """Decay by the same factor in every step: `learning_rate * final_fraction ** progress`, progress from 0 to 1.

    Attributes:
      learning_rate: the peak, reached at the end of warmup.
      warmup_steps: updates of linear warmup.
      final_fraction: the rate at the end of the run, as a share of the peak; not 0, which no exponential reaches.
    """

    learning_rate: float
    warmup_steps: int = 0
    final_fraction: float = 0.01

    def __post_init__(self):
        _check(self, final_fraction=self.final_fraction)
        if self.final_fraction == 0:
            raise UserError("ExponentialSchedule.final_fraction must not be 0: an exponential never gets there.")

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates."""
        decay_steps, final = _after_warmup(self, num_steps), self.learning_rate * self.final_fraction
        return _warm_up(
            self, optax.exponential_decay(self.learning_rate, decay_steps, self.final_fraction, end_value=final)
        )


@configurable
class StepSchedule:
    """A constant rate that is multiplied by `factor` at every boundary.

    Attributes:
      learning_rate: the rate between warmup and the first boundary.
      boundaries: the steps, counted from the start of the run and increasing, from which on the rate is lower.
      factor: what the rate is multiplied by at each boundary.
      warmup_steps: updates of linear warmup; over before the first boundary.
    """

    learning_rate: float
    boundaries: tuple[int, ...]
    factor: float = 0.1
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self, factor=self.factor)
        steps = (self.warmup_steps, *self.boundaries)
        if not self.boundaries or any(a >= b for a, b in itertools.pairwise(steps)):
            raise UserError(
                f"StepSchedule.boundaries must be increasing steps after warmup_steps ({self.warmup_steps}), "
                f"not {self.boundaries}."
            )

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates."""
        _after_warmup(self, num_steps)
        if self.boundaries[-1] >= num_steps:
            raise UserError(
                f"StepSchedule.boundaries {self.boundaries} go beyond the run ({num_steps} steps): "
                "remove those boundaries or raise STEPS."
            )
        factors = {boundary - self.warmup_steps: self.factor for boundary in self.boundaries}
        return _warm_up(self, optax.piecewise_constant_schedule(self.learning_rate, factors))


@configurable
class WarmupStableDecaySchedule:
    """Constant, then a straight line down at the end of the run (Hu et al. 2024, MiniCPM, section 4).

    Attributes:
      learning_rate: the rate between warmup and decay.
      warmup_steps: updates of linear warmup.
      decay_fraction: the share of the whole run that the final decay takes.
      final_fraction: the rate at the end of the run, as a share of the peak.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.0

    def __post_init__(self):
        _check(self, decay_fraction=self.decay_fraction, final_fraction=self.final_fraction)

    def build(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule of a run of `num_steps` updates."""
        after_warmup = _after_warmup(self, num_steps)
        decay_steps = max(1, round(self.decay_fraction * num_steps))
        if decay_steps > after_warmup:
            raise UserError(
                f"WarmupStableDecaySchedule: warmup_steps ({self.warmup_steps}) and decay_fraction "
                f"({self.decay_fraction}: {decay_steps} steps) do not fit into the run ({num_steps} steps). Lower one."
            )
        final = self.learning_rate * self.final_fraction
        return _warm_up(
            self,
            optax.linear_schedule(self.learning_rate, final, decay_steps, transition_begin=after_warmup - decay_steps),
        )


Schedule = (
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | InverseSquareRootSchedule
    | ExponentialSchedule
    | StepSchedule
    | WarmupStableDecaySchedule
)
