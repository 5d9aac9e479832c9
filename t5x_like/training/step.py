"""The training step: a pure function of the state and a batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from t5x_like.kernels.randomness import row_keys
from t5x_like.learning.gradient import loss_gradient
from t5x_like.learning.loss import Loss, total_weights
from t5x_like.learning.router_losses import balance_experts, router_metrics
from t5x_like.models.parameters import GraphDef, Params
from t5x_like.models.token_loss import Batch
from t5x_like.models.transformer import ModelConfig
from t5x_like.training.by_layer import by_layer, norm
from t5x_like.training.guards import judge, select
from t5x_like.training.state import TrainState, random_key

Metrics = dict[str, Float[Array, ""]]
LAYER_NORMS = "layer_norms"
"""The metric, not a number but a tree, of norms of gradients and updates layer by layer."""
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    config: ModelConfig,
    graphdef: GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    loss: Loss,
    *,
    seed: int,
    gradient_accumulation: int = 1,
    ema_decay: float | None = None,
    spike_sigmas: float | None = None,
    norm_axes: Params | None = None,
) -> TrainStep:
    """The update of one global batch; jit it once, with the state donated.

    A step whose loss or gradient is not finite, or a spike, counts but changes nothing; see `guards`.

    The gradient is that of (sum of token losses) / (sum of token weights) over the whole global batch, however it is
    sharded or cut into microbatches. With `norm_axes`, the parameters' logical axes, the metrics hold `LAYER_NORMS`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        totals = total_weights(loss, config, batch)
        keys = row_keys(random_key(seed, "dropout", state.step), next(iter(batch.values())).shape[0])

        gradient = partial(loss_gradient, loss, graphdef, totals=totals, share=1 / gradient_accumulation)
        if gradient_accumulation == 1:
            grads, results = gradient(state.params, batch, keys)
        else:
            add = lambda total, new: jax.tree.map(jnp.add, total, new)
            accumulate = lambda total, part: (add(total, gradient(state.params, *part)), None)
            parts = microbatches((batch, keys), gradient_accumulation)
            shapes = jax.eval_shape(gradient, state.params, *jax.tree.map(lambda a: a[0], parts))
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            (grads, results), _ = lax.scan(accumulate, zeros, parts)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = balance_experts(config, optax.apply_updates(state.params, updates), results.stats)
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params)
        result_metrics, grad_norm = results.metrics(), optax.tree.norm(grads)
        ok, guard = judge(state.guard, result_metrics["loss"], grad_norm, spike_sigmas)
        params, opt_state, ema = select(ok, (params, opt_state, ema), (state.params, state.opt_state, state.ema))
        metrics = {
            **result_metrics,
            **router_metrics(config, results.stats),
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.guard.accepted), jnp.float32),
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.skipped_in_a_row,
        }
        if norm_axes is not None:
            trees = {"gradient": grads, "update": updates}
            metrics[LAYER_NORMS] = {name: by_layer(norm, tree, norm_axes) for name, tree in trees.items()}
        return TrainState(state.step + 1, params, opt_state, ema, guard), metrics

    return train_step


def microbatches(batch: Any, count: int) -> Any:
    """Arrays [batch, ...] -> [count, batch / count, ...], row i of the batch in microbatch i % count.

    Taking neighbours apart keeps every device's rows on that device.
    """
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1), batch)
