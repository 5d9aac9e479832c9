"""What happens after every step, and the role that adds an effect to a run; their order is in `loop`."""

import abc
from typing import TYPE_CHECKING, NamedTuple

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.data.build import Data

if TYPE_CHECKING:  # These know effects, as parts of a run's configuration.
    from t5x_like.training.experiment import Experiment
    from t5x_like.training.job import Job
    from t5x_like.training.state import TrainState
    from t5x_like.training.step import Metrics


class Run(NamedTuple):
    """The facts of a run.

    Attributes:
      experiment: its configuration.
      job: the experiment on its mesh.
      data: what it trains on.
      directory: MODEL_DIR.
    """

    experiment: "Experiment"
    job: "Job"
    data: Data
    directory: RunDirectory


class Effect(abc.ABC):
    """Acts after every step.

    Every process runs every effect. Arrays are those on the devices: fetching one waits for the step, so an effect does
    that only at the steps that it is there for. The state must not be kept: the next step reuses its memory.
    """

    @abc.abstractmethod
    def after_step(self, step: int, state: "TrainState", metrics: "Metrics") -> None:
        """Acts when update number `step` (from 1 on) has been dispatched."""

    def end(self) -> None:  # noqa: B027 (most have nothing to close)
        """Closes what is open, whichever way training ends."""


class EffectConfig(abc.ABC):
    """An effect of your own is built by a configurable subclass, which `RunConfig.effects` names."""

    @abc.abstractmethod
    def build(self, run: Run, step: int) -> Effect:
        """The effect that acts in this run from `step` on; built again after a rollback."""
