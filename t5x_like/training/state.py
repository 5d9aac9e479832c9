"""What training carries from step to step, and how it comes to be, sharded from its first byte."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from t5x_like.models.parameters import Params, split
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.placement import Placement
from t5x_like.training.guards import GuardState, initial_guard
from t5x_like.training.optimizers import state_axes


class TrainState(NamedTuple):
    """A plain pytree: all that a checkpoint holds.

    Random numbers and data are functions of `step` and the run's seed; they have no state of their own.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None
    guard: GuardState

    @property
    def averaged(self) -> Params:
        """The parameters to evaluate: their average where there is one."""
        return self.params if self.ema is None else self.ema


def random_key(seed: int, stream: str, step: Int[Array, ""] | int = 0) -> PRNGKeyArray:
    """The key of a named stream at a step; adding a stream never moves the others."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()) >> 1), step)


def state_factory(
    config: ModelConfig, optimizer: optax.GradientTransformation, *, seed: int, use_ema: bool
) -> Callable[[], TrainState]:
    """A function that makes the state of step 0 (trace it, or run it under `jax.jit` with out_shardings)."""

    def create() -> TrainState:
        params = split(config.build(random_key(seed, "params")))[1]
        # A copy: two leaves of a donated state must not share one buffer.
        ema = jax.tree.map(jnp.copy, params) if use_ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, initial_guard())

    return create


def abstract_state(create: Callable[[], TrainState], axes: Params, placement: Placement) -> TrainState:
    """Shapes, dtypes and shardings of the state: the target of initialisation and of every restore."""
    shapes = jax.eval_shape(create)
    whole = placement.sharding((), ())
    placed = TrainState(
        step=whole,
        params=placement.shardings(axes, shapes.params),
        opt_state=placement.shardings(state_axes(shapes.opt_state, axes), shapes.opt_state),
        ema=None if shapes.ema is None else placement.shardings(axes, shapes.ema),
        guard=jax.tree.map(lambda _: whole, shapes.guard),
    )
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed)


def initial_state(create: Callable[[], TrainState], target: TrainState) -> TrainState:
    """The state of step 0, each device making only its shards; equal on every mesh."""
    return jax.jit(create, out_shardings=jax.tree.map(lambda a: a.sharding, target))()
