"""How the tokens that chose an expert reach it: whether an expert takes all of them, and by which exchange."""

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Array, Float, Int

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.dispatch import capacity_rows, of_tokens
from t5x_like.sharding.experts import Shares, by_equal_rows, by_gather, by_ragged_all_to_all


@dataclasses.dataclass(frozen=True)
class Experts:
    """One device's part of a mixture, by which the choice of a router is carried out.

    Attributes:
      num_experts: of the whole mixture.
      experts_per_token: how many of them a token sees.
      compute: runs this device's experts on rows, see `run_experts`.
      dispatch: how tokens reach them.
      shares: how the mesh splits tokens and experts.
      group: that many neighbouring tokens share the places of an expert, or are chosen from together.
      balance_bias: of the router; None: it has none.
    """

    num_experts: int
    experts_per_token: int
    compute: Callable[..., Float[Array, "*rows embed"]]
    dispatch: "Dispatch"
    shares: Shares
    group: int
    balance_bias: Float[Array, "experts"] | None = None


class Dispatch(abc.ABC):
    """The role of what brings tokens and their experts together.

    Attributes:
      group_size: tokens at most that share an expert's places; None: all places are there for all.
      depends_on_place: whether a token's place in the batch decides if its expert takes it.
    """

    group_size: int | None = None
    depends_on_place: bool = False

    @abc.abstractmethod
    def send(
        self,
        x: Float[Array, "tokens embed"],
        chosen: Int[Array, "tokens choices"],
        factors: Float[Array, "tokens choices"],
        experts: Experts,
    ) -> tuple[Float[Array, "tokens embed"], Int[Array, ""]]:
        """The weighted sum of each token's experts, and how many assignments found no place.

        Args:
          x: this device's tokens.
          chosen: the experts of each; `num_experts` for none.
          factors: on the experts' outputs.
          experts: of this device.
        """


@configurable
class DroplessConfig(Dispatch):
    """Every token reaches all of its experts, however many tokens an expert gets.

    Attributes:
      exchange: how tokens and experts meet where the mesh splits the experts. `gather`: every device sees all tokens of
        its `expert` axis; runs anywhere, and sends least when experts_per_token is near the axis' size or above.
        `ragged_all_to_all`: each copy of a token travels to its expert's device and back; for TPUs.
      buffer_factor: rows for a device's experts, as a multiple of their average number where the mesh splits the
        experts; None: as many as there could be. With a factor, assignments that find no row are dropped and counted.
      backend: the kernel of the grouped products; `auto`: the first that can do it (see docs/kernels.md).
    """

    exchange: Literal["gather", "ragged_all_to_all"] = "gather"
    buffer_factor: float | None = None
    backend: Literal["auto", "tpu", "triton", "reference", "chunked"] = "auto"

    def __post_init__(self):
        if self.buffer_factor is not None and self.buffer_factor < 1:
            raise UserError(
                f"DroplessConfig.buffer_factor is {self.buffer_factor}: below 1 tokens are dropped even when the "
                "experts are balanced; use 1.25 or more, or None."
            )

    def send(self, x, chosen, factors, experts: Experts):
        exchange = by_gather if self.exchange == "gather" else by_ragged_all_to_all
        # On the average device, experts get as many rows as its own tokens make.
        compute = partial(experts.compute, backend=self.backend, expected_rows=chosen.size)
        return exchange(x, chosen, factors, compute, experts.num_experts, experts.shares, self.buffer_factor)


@configurable
class CapacityConfig(Dispatch):
    """An expert takes a fixed number of a group's tokens, the first that choose it; the others go without (T5X).

    The number is `capacity_factor * group size / num_experts`, so top-2 routing needs a factor above 2 to lose few.

    Attributes:
      capacity_factor: 1 for as many places as tokens.
      group_size: tokens at most that share an expert's places. Groups are whole sequences, or equal parts of one: the
        largest that the batch allows.
      min_capacity: places an expert has at least.
    """

    capacity_factor: float = 1.25
    group_size: int = 4096
    min_capacity: int = 4

    depends_on_place = True

    def __post_init__(self):
        if self.capacity_factor <= 0:
            raise UserError(f"CapacityConfig.capacity_factor is {self.capacity_factor}: it must be positive.")
        for name in ("group_size", "min_capacity"):
            if getattr(self, name) < 1:
                raise UserError(f"CapacityConfig.{name} is {getattr(self, name)}: it must be at least 1.")

    def send(self, x, chosen, factors, experts: Experts):
        num_experts, group = experts.num_experts, experts.group
        capacity = min(max(round(self.capacity_factor * group / num_experts), self.min_capacity), group)
        assignments, dropped = capacity_rows(chosen.reshape(-1, group, chosen.shape[-1]), num_experts, capacity)
        rows, factors = of_tokens(assignments, factors)
        return by_equal_rows(x, rows, factors, experts.compute, num_experts, experts.shares), dropped
