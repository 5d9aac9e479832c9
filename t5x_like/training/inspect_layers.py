"""Effects that look into the layers: their norms on request, and where a value first became non-finite."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_like.errors import UserError
from t5x_like.learning.gradient import loss_gradient
from t5x_like.learning.loss import batch_loss
from t5x_like.models.parameters import Params
from t5x_like.models.probe import PARTS, Size, StackSizes, looking
from t5x_like.models.token_loss import Batch
from t5x_like.sharding.logical import local_rows, on_devices
from t5x_like.training.by_layer import by_layer, named
from t5x_like.training.effects import Effect, Run
from t5x_like.training.recovery import Recovery
from t5x_like.training.reporter import Reporter
from t5x_like.training.state import TrainState, random_key
from t5x_like.training.step import LAYER_NORMS, Metrics


class Replay:
    """Runs the batch of a step once more, outside of the compiled step, and looks at all layers."""

    def __init__(self, run: Run, recovery: Recovery):
        self.job, self._data, self._recovery = run.job, run.data, recovery
        self._seed, self._loss = run.experiment.run.seed, run.experiment.run.loss
        self._run = jax.jit(self._seen)
        self._gradient = jax.jit(lambda *inputs: loss_gradient(self._loss, self.job.spec.graphdef, *inputs)[0])

    def activations(self, step: int, params: Params) -> tuple[dict[tuple[str, int, str], Size], float]:
        """Every activation by stack, layer and part, in the order of computation, and the loss; not accumulated."""
        loss, found = jax.device_get(self._run(*self._inputs(step, params)))
        sizes = {}
        for (name, stack), seen in zip(self.job.model.stacks.items(), found, strict=True):
            for layer in range(stack.num_layers):
                (kind, place), index = stack.locate(layer)
                parts = jax.tree.map(lambda x: float(x if index is None else x[index]), seen[kind][place])  # noqa: B023
                sizes |= {(name, layer, part): parts[part] for part in PARTS if part in parts}
        return sizes, float(loss)

    def gradient(self, step: int, params: Params) -> Params:
        return self._gradient(*self._inputs(step, params))

    def _inputs(self, step: int, params: Params) -> tuple[Params, Batch, jax.Array]:
        batch = self._data.train.batch(self._recovery.batch_number(step - 1), local_rows(self.job.batch))
        return params, on_devices(batch, self.job.batch), random_key(self._seed, "dropout", step - 1)

    def _seen(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, list[StackSizes]]:
        with looking() as stacks:
            loss, _ = batch_loss(self._loss, self.job.spec.graphdef, params, batch, key)
        # Every process reads them.
        return jax.lax.with_sharding_constraint((loss, stacks), PartitionSpec())


@dataclasses.dataclass
class FindNonFinite(Effect):
    """Ends training at the first step whose loss or gradient is not finite, and says where that comes from.

    It waits for every step: for debugging (`train --debug_nans`).
    """

    replay: Replay

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
            if size.bad:
                return f"the {part} of layer {layer} of the {stack} is the first activation that is not finite"
        if not math.isfinite(loss):
            return "all layers are finite, but the loss of the head is not"
        if bad := self._non_finite(self.replay.gradient(step, params)):
            return f"the forward pass is finite, but the gradient of {min(bad, key=self._backward)} is not"
        return "a value is not finite, but none was when the batch was run again"

    def _non_finite(self, tree: Params) -> list[str]:
        """The names of what holds a value that is not finite."""
        axes = self.replay.job.spec.axes
        finite = jax.jit(lambda tree: by_layer(lambda x, axis: jnp.all(jnp.isfinite(x), axis=axis), tree, axes))
        return [name for name, good in named(finite(tree), self.replay.job.model.layers) if not good]

    def _backward(self, name: str) -> tuple[int, int, int, str]:
        """Sorts names of parameters as the backward pass comes by: head, last norm, layers from the last, embedding.

        What several layers share has its gradient when all of them have given theirs.
        """
        top, *inner = name.split("/")
        stacks = self.replay.job.model.stacks
        if top not in stacks:
            return (0 if top == "head" else len(stacks) + 1), 0, 0, name
        # The decoder comes before the encoder.
        turn = len(stacks) - list(stacks).index(top)
        if not inner[0].isdecimal():
            return turn, (-stacks[top].num_layers if inner[0] == "final_norm" else 1), 0, name
        layer, part, *_ = inner
        return turn, -int(layer), -[part.startswith(known) for known in PARTS].index(True), name


@dataclasses.dataclass
class Norms(Effect):
    """Records norms layer by layer; see LoggingConfig.norms_every_steps."""

    every_steps: int
    replay: Replay
    reporter: Reporter

    def after_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        if step % self.every_steps == 0:
            with self.reporter.aside(step, "evaluate"):
                self.reporter.attempt("look", self._record, step, state, metrics)

    def _record(self, step: int, state: TrainState, metrics: Metrics) -> None:
        sizes, _ = self.replay.activations(step, state.params)
        values = {f"activation/{'/'.join(map(str, place))}": math.sqrt(size.square) for place, size in sizes.items()}
        layers = self.replay.job.model.layers
        self.reporter.norms(step, values | dict(named(metrics[LAYER_NORMS], layers)))
