"""The state of step 0: random parameters, or those of another run."""

import re

import jax
import jax.numpy as jnp
from absl import logging

from t5x_like.checkpoints.layers import Layers
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.training.state import TrainState


@configurable
class InitialCheckpointConfig:
    """Parameters to begin with, from a checkpoint of another run or of an imported model.

    Attributes:
      model_dir: MODEL_DIR of the other run.
      step: which checkpoint; None: the newest.
      parameters: regular expression for the whole names of the parameters to take, e.g. `stack/.*` or
        `(?!head).*`; the others begin at random. `t5x_like train --dry_run` prints the names.
    """

    model_dir: str
    step: int | None = None
    parameters: str = ".*"

    def __post_init__(self):
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise UserError(
                f"InitialCheckpointConfig.parameters is {self.parameters!r}, no regular expression: {error}."
            ) from error


def with_parameters_of(config: InitialCheckpointConfig, state: TrainState, layers: Layers) -> TrainState:
    """The state of step 0 with the parameters (and their average) that the other run has, laid out as they are here.

    Args:
      config: which parameters, and whose.
      state: of step 0.
      layers: at which places it has them; the other run may have them at others.

    Raises:
      UserError: if there is no such checkpoint, no parameter is meant, or one is missing there or has another shape.
    """
    checkpoints = Checkpoints(RunDirectory(config.model_dir).checkpoints, CheckpointConfig())
    step = checkpoints.newest_good() if config.step is None else checkpoints.check(config.step)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): path
        for path, _ in jax.tree.leaves_with_path(state.params)
    }
    chosen = {path for name, path in named.items() if re.fullmatch(config.parameters, name)}
    if not chosen:
        raise UserError(
            f"InitialCheckpointConfig.parameters ({config.parameters}) names no parameter of this model; "
            f"it has {', '.join(list(named)[:5])}, ..."
        )
    target = jax.tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if path in chosen else None,
        state.params,
    )
    taken = checkpoints.restore({"params": target}, step, partial=True, layers=layers)["params"]
    values = dict(jax.tree.leaves_with_path(taken))
    params = jax.tree.map_with_path(lambda path, x: values.get(path, x), state.params)
    logging.info("%d of %d parameters are those of %s.", len(chosen), len(named), config.model_dir)
    # A copy: two leaves of a donated state must not share one buffer.
    return state._replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))
