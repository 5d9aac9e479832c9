"""Steps that must not count: a non-finite or spiking one is skipped, inside the compiled step.

Nothing waits for the verdict: the update is selected on the devices, and the counts travel with the other metrics.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_like.configurable import configurable
from t5x_like.errors import UserError

T = TypeVar("T")

WINDOW = 128
"""Accepted steps that the next one is compared with; none is called a spike before there are so many."""

LEAST_DEVIATION = 0.01
"""As a share of the mean: a loss that hardly moves makes no spike of every tremor."""


@configurable
class GuardConfig:
    """What is done about steps, devices and processes that go wrong.

    A step whose loss or gradient is not finite is always skipped: parameters, optimizer state and their average stay as
    they are, and training goes on with the next batch.

    Attributes:
      spike_sigmas: also skips a step whose loss or gradient norm is this many standard deviations above the mean of the
        last 128 steps that were not skipped (6 is usual); None: only what is not finite.
      rollback_after: so many steps skipped in a row bring training back to the newest checkpoint, and past the data
        since then.
      max_rollbacks: after so many returns to the same checkpoint the run stops with a report of the data.
      compare_replicas_every_steps: steps between comparisons of the devices' copies of the parameters (also before
        every save); copies that differ name the device and bring training back to the newest checkpoint. None: never.
      hang_minutes: a process in which no step, evaluation or save ends for this long prints all stacks and ends, for
        `train --restarts` to start it again; None: waits for ever. Must exceed the longest evaluation.
    """

    spike_sigmas: float | None = None
    rollback_after: int = 10
    max_rollbacks: int = 3
    compare_replicas_every_steps: int | None = 1000
    hang_minutes: float | None = 60.0

    def __post_init__(self):
        for name in ("rollback_after", "max_rollbacks", "compare_replicas_every_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"GuardConfig.{name} is {value}: it must be at least 1.")
        for name in ("spike_sigmas", "hang_minutes"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"GuardConfig.{name} is {value}: it must be above 0, or None.")


class GuardState(NamedTuple):
    """What the guard knows; part of the train state, so that a resumed run judges as an uninterrupted one.

    Attributes:
      history: loss and gradient norm of the last accepted steps; step i of them in column i % WINDOW.
      accepted: steps taken.
      skipped: steps not taken.
      skipped_in_a_row: of them, those since the last one taken.
    """

    history: Float[Array, "2 window"]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def initial_guard() -> GuardState:
    zero = lambda: jnp.zeros((), jnp.int32)  # A buffer each: a donated state must not share them.
    return GuardState(jnp.zeros((2, WINDOW), jnp.float32), zero(), zero(), zero())


def judge(
    guard: GuardState, loss: Float[Array, ""], grad_norm: Float[Array, ""], spike_sigmas: float | None
) -> tuple[Bool[Array, ""], GuardState]:
    """Whether a step may count, and what the guard knows after it; only accepted values enter the history."""
    values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    ok = jnp.all(jnp.isfinite(values))
    if spike_sigmas is not None:
        mean, deviation = jnp.mean(guard.history, axis=1), jnp.std(guard.history, axis=1)
        limits = mean + spike_sigmas * jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(mean))
        ok &= (guard.accepted < WINDOW) | jnp.all(values <= limits)
    column = guard.accepted % WINDOW
    # The old value is written back, not the new one times zero: 0 * nan is nan.
    kept = jnp.where(ok, values, guard.history[:, column])
    one = ok.astype(jnp.int32)
    return ok, GuardState(
        guard.history.at[:, column].set(kept),
        guard.accepted + one,
        guard.skipped + 1 - one,
        jnp.where(ok, 0, guard.skipped_in_a_row + 1),
    )


def select(ok: Bool[Array, ""], new: T, old: T) -> T:
    """`new` where the step counts, else `old` bit for bit; trees of arrays."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
