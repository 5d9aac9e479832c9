"""What training minimises on a batch: the losses of the model's head, and those of its routers."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.kernels.randomness import row_keys
from t5x_like.learning.router_losses import Stats, router_objective
from t5x_like.models.context import TokenInfo
from t5x_like.models.parameters import GraphDef, Params, merge
from t5x_like.models.token_loss import Batch, LossConfig
from t5x_like.models.transformer import ModelConfig, Transformer
from t5x_like.sharding.context import balanced

Totals = dict[str, Float[Array, ""]]


class BatchLoss(NamedTuple):
    """Results on a batch, or on a share of one: they may be added up.

    Attributes:
      sums: of every metric, by term and name.
      weights: of every term.
      stats: of the routers.
    """

    sums: dict[str, dict[str, Float[Array, ""]]]
    weights: Totals
    stats: Stats

    def metrics(self) -> dict[str, Float[Array, ""]]:
        """Every metric's mean over what its term is about, and the weight of each term, e.g. `num_tokens`."""
        means = {
            name: value / jnp.maximum(self.weights[term], 1)
            for term, sums in self.sums.items()
            for name, value in sums.items()
        }
        return means | {f"num_{term}": weight for term, weight in self.weights.items()}


def total_weights(model: Transformer, batch: Batch) -> Totals:
    """What the terms of the loss are divided by: the sum of the weights of each, over the whole batch."""
    return jax.tree.map(lambda weight: jnp.maximum(jnp.sum(weight), 1), model.head.weights(batch))


def any_order(config: ModelConfig) -> bool:
    """Whether nothing in the loss depends on where in its row a token lies, except through its position.

    The head and the parts of the layers say so.
    """
    blocks = [block for stack in config.stacks.values() for block in stack.distinct]
    parts = [config.head, *(part for block in blocks for part in (block.mixer, block.feedforward) if part is not None)]
    return not any(part.depends_on_place for part in parts)


def batch_loss(
    config: LossConfig,
    graphdef: GraphDef,
    params: Params,
    batch: Batch,
    dropout_key: PRNGKeyArray | None = None,
    *,
    totals: Totals | None = None,
    share: float = 1.0,
) -> tuple[Float[Array, ""], BatchLoss]:
    """Runs the model on a batch, or on one of its microbatches.

    Args:
      config: the loss of tokens.
      graphdef: of the model.
      params: its parameters.
      batch: arrays by feature name.
      dropout_key: turns dropout on; one, or one per row.
      totals: `total_weights` of the whole batch; None: `batch` is the whole.
      share: of this batch in the whole, for what routers report as means.

    Returns:
      The share of this batch in the loss, to be differentiated, and its results.
    """
    model = merge(graphdef, params)
    totals = total_weights(model, batch) if totals is None else totals
    model_key, head_key = model.dropout_keys(by_row(dropout_key, batch), 2)
    with reordered(model.config, batch, model_key) as batch:
        output = model.run(batch, model_key)
    objective, sums, weights = head_loss(config, model, output.x, output.tokens, batch, head_key, totals)
    objective += share * router_objective(model.config, output.stats)
    return objective, BatchLoss(sums, weights, jax.tree.map(lambda mean: share * mean, output.stats))


def by_row(dropout_key: PRNGKeyArray | None, batch: Batch) -> PRNGKeyArray | None:
    """A key for each row of the batch."""
    single = dropout_key is not None and dropout_key.ndim == 0
    return row_keys(dropout_key, next(iter(batch.values())).shape[0]) if single else dropout_key


def reordered(
    config: ModelConfig, batch: Batch, dropout_key: PRNGKeyArray | None
) -> contextlib.AbstractContextManager[Batch]:
    """The batch in the order of tokens that balances the devices of long rows, where that changes nothing else."""
    return balanced(batch) if dropout_key is None and any_order(config) else contextlib.nullcontext(batch)


def head_loss(
    config: LossConfig,
    model: Transformer,
    x: Float[Array, "batch length embed"],
    tokens: TokenInfo,
    batch: Batch,
    dropout_key: PRNGKeyArray | None,
    totals: Totals,
) -> tuple[Float[Array, ""], dict[str, dict[str, Float[Array, ""]]], Totals]:
    """The head's part of the objective, and sums and weights as in `BatchLoss`."""
    terms = model.head.terms(
        x, batch, loss=config, embedding=model.embedding[...], is_token=tokens.is_token, dropout_key=dropout_key
    )
    objective = sum(term.objective / totals[name] for name, term in terms.items())
    sums = {name: term.metrics for name, term in terms.items()}
    return objective, sums, {name: term.weight for name, term in terms.items()}
