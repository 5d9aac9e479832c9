"""What a plan says, and what it is asked about."""

from dataclasses import dataclass

from t5x_like.planning.memory import Memory
from t5x_like.planning.timing import Timing
from t5x_like.planning.topology import Topology
from t5x_like.training.experiment import Experiment


@dataclass(frozen=True)
class Request:
    """A run, and where it would run.

    Attributes:
      experiment: the run's configuration.
      topology: the devices.
      vocab_size: of the tokenizer (or the model, where that states it).
      quick: stop the compiler when it has reserved memory: about an eighth of its time, but without cycles, so that
        time is by FLOPs at a fixed share of the peak and the collectives of the compiled program.
    """

    experiment: Experiment
    topology: Topology
    vocab_size: int
    quick: bool = False


@dataclass
class Plan:
    """The answer.

    Attributes:
      source: `compiler`: memory and schedule of the compiled step; `quick`: see Request; `model`: the analytical model.
      topology: the devices.
      mesh: sizes of the mesh's axes.
      num_parameters: of the model.
      num_active_parameters: those that a token uses.
      tokens_per_step: of the global batch.
      rows_per_device: sequences per device and step.
      memory: of the device with most.
      out_of_memory: bytes needed, if that is more than there is.
      model_flops: of a step, by the rule of MFU.
      hardware_flops: of a step's matrix products, recomputation included.
      timing: the predicted step; None if nothing could be predicted (out of memory, or a CPU).
      cycles: that the compiler estimates for the step, without Pallas kernels; None where it gives none.
      compile_seconds: that the compiler took.
      versions: of what compiled it.
    """

    source: str
    topology: Topology
    mesh: dict[str, int]
    num_parameters: int
    num_active_parameters: int
    tokens_per_step: int
    rows_per_device: float
    memory: Memory
    out_of_memory: int | None
    model_flops: float
    hardware_flops: float
    timing: Timing | None
    cycles: float | None = None
    compile_seconds: float = 0.0
    versions: str = ""

    @property
    def seconds(self) -> float | None:
        """Of a step."""
        return self.timing.seconds if self.timing is not None else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_per_step / self.seconds if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s as a share of the peak; see `training.flops.COUNTING_RULE`."""
        peak = self.topology.chip.peak_flops
        return self.model_flops / (self.seconds * peak * self.topology.num_devices) if self.seconds and peak else None

    def days(self, tokens: float) -> float | None:
        """To train on so many tokens."""
        return tokens / self.tokens_per_second / 86400 if self.tokens_per_second else None

    def cost(self, tokens: float, price_per_chip_hour: float) -> float | None:
        days = self.days(tokens)
        return days * 24 * self.topology.num_chips * price_per_chip_hour if days else None
