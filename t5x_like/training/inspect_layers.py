"""Effects that look into the layers: their norms on request, and where a value first became non-finite."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from t5x_like.errors import UserError
from t5x_like.learning.gradient import loss_gradient
from t5x_like.learning.loss import batch_loss
from t5x_like.models.parameters import Params
from t5x_like.models.probe import PARTS, looking
from t5x_like.models.token_loss import Batch
from t5x_like.sharding.logical import local_rows, on_devices
from t5x_like.training.by_layer import by_layer, named
from t5x_like.training.effects import Effect, Run
from t5x_like.training.recovery import Recovery
from t5x_like.training.reporter import Reporter
from t5x_like.training.state import TrainState, random_key
from t5x_like.training.step import LAYER_NORMS, Metrics

Sizes = dict[tuple[str, int, str], float]
"""Root mean squares of activations by stack, layer and part."""


class Replay:
    """Runs the batch of a step once more, outside of the compiled step, and looks at all layers."""

    def __init__(self, run: Run, recovery: Recovery):
        self._run, self._recovery = run, recovery
        self._sizes: Sizes = {}
        self._activations = jax.jit(self._loss)
        self._gradient = jax.jit(self._grads)

    def activations(self, step: int, params: Params) -> tuple[Sizes, float]:
        """The size of every activation of the batch of a step, and the loss, without accumulation."""
        self._sizes.clear()
        loss = float(self._activations(params, *self._inputs(step)))
        jax.effects_barrier()
        order = lambda key: (key[0] != "stack", key[1], PARTS.index(key[2]))
        return {key: self._sizes[key] for key in sorted(self._sizes, key=order)}, loss

    def gradient(self, step: int, params: Params) -> Params:
        return self._gradient(params, *self._inputs(step))

    def _inputs(self, step: int) -> tuple[Batch, jax.Array]:
        job, data, seed = self._run.job, self._run.data, self._run.experiment.run.seed
        batch = data.train.batch(self._recovery.batch_number(step - 1), local_rows(job.batch))
        return on_devices(batch, job.batch), random_key(seed, "dropout", step - 1)

    def _loss(self, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        with looking(self._look):
            return batch_loss(self._run.experiment.run.loss, self._run.job.spec.graphdef, params, batch, key)[0]

    def _grads(self, params: Params, batch: Batch, key: jax.Array) -> Params:
        return loss_gradient(self._run.experiment.run.loss, self._run.job.spec.graphdef, params, batch, key)[0]

    def _look(self, stack: str, part: str, number: jax.Array, size: jax.Array) -> None:
        place = stack, int(number), part
        # Devices may each show a share; what is not finite stays.
        self._sizes[place] = float(size) if math.isfinite(self._sizes.get(place, 0.0)) else self._sizes[place]


@dataclasses.dataclass
class FindNonFinite(Effect):
    """Ends training at the first step whose loss or gradient is not finite, and says where that comes from.

    It waits for every step: for debugging (`train --debug_nans`).
    """

    replay: Replay
    axes: Params

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        values = jax.device_get((metrics["loss"], metrics["grad_norm"]))
        if all(map(math.isfinite, values)):
            return
        # The step was skipped: these are the parameters that it began with.
        raise UserError(f"--debug_nans: at step {step}, {self.cause(step, state.params)}.")

    def cause(self, step: int, params: Params) -> str:
        """What is the first value that is not finite, in words."""
        if bad := self._non_finite(params):
            return f"parameter {bad[0]} is not finite before the step"
        sizes, loss = self.replay.activations(step, params)
        for (stack, layer, part), size in sizes.items():
            if not math.isfinite(size):
                return f"the {part} of layer {layer} of the {stack} is the first activation that is not finite"
        if not math.isfinite(loss):
            return "all layers are finite, but the loss of the head is not"
        bad = self._non_finite(self.replay.gradient(step, params))
        if bad:
            # The backward pass begins at the last layer.
            return f"the forward pass is finite, but the gradient of {bad[-1]} is not"
        return "a value is not finite, but none was when the batch was run again"

    def _non_finite(self, tree: Params) -> list[str]:
        """The names of what holds a value that is not finite."""
        finite = jax.jit(lambda tree: by_layer(lambda x, axis: jnp.all(jnp.isfinite(x), axis=axis), tree, self.axes))
        return [name for name, good in named(finite(tree)) if not good]


@dataclasses.dataclass
class Norms(Effect):
    """Records norms layer by layer; see LoggingConfig.norms_every_steps."""

    every_steps: int
    replay: Replay
    reporter: Reporter

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        if step % self.every_steps == 0:
            self.reporter.flush()
            self.reporter.attempt("look", self._record, step, state, metrics)
            self.reporter.restart_clock(step)

    def _record(self, step: int, state: TrainState, metrics: Metrics) -> None:
        sizes, _ = self.replay.activations(step, state.params)
        values = {f"activation/{stack}/{layer}/{part}": size for (stack, layer, part), size in sizes.items()}
        self.reporter.norms(step, values | dict(named(metrics[LAYER_NORMS])))
