"""What training minimises on a batch: the terms of a loss, which are the head's own by default, and the routers'."""

import abc
import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.kernels.randomness import row_keys
from t5x_like.learning.router_losses import Stats, router_objective
from t5x_like.models.parameters import GraphDef, Params, merge
from t5x_like.models.token_loss import Batch, Term, TokenLoss
from t5x_like.models.transformer import ModelConfig, Output, Transformer
from t5x_like.sharding.context import balanced

Totals = dict[str, Float[Array, ""]]


class Loss(abc.ABC):
    """The role of a loss: terms of a batch, each divided by the sum of its weights over the whole batch.

    Rows may come in parts (accumulation, pipelines): a term is a sum over rows.
    """

    @abc.abstractmethod
    def terms(
        self, model: Transformer, output: Output, batch: Batch, dropout_key: PRNGKeyArray | None
    ) -> dict[str, Term]:
        """The terms by name, one of them with the metric `loss`; a pure function.

        Args:
          model: with the head: `model.head.scores`, `.log_likelihoods`.
          output: what the model makes of the batch.
          batch: arrays by feature name.
          dropout_key: turns dropout of the head on.
        """

    def weights(self, config: ModelConfig, batch: Batch) -> dict[str, Float[Array, "..."]]:
        """The weights of what each term is about, by the term's name; those of the head by default."""
        return config.head.weights(batch, config.features)

    def depends_on_place(self, config: ModelConfig) -> bool:
        """Whether it depends on where in its row a token stands, beyond the token's position."""
        return True

    def reported(self) -> "Loss":
        """The loss of evaluation: without what only helps training."""
        return self


@configurable
class LossConfig(TokenLoss, Loss):
    """The loss of the model's head; the settings are for heads that score the tokens of the vocabulary."""

    def terms(
        self, model: Transformer, output: Output, batch: Batch, dropout_key: PRNGKeyArray | None
    ) -> dict[str, Term]:
        options = {"embedding": model.embedding[...], "is_token": output.tokens.is_token, "dropout_key": dropout_key}
        return model.head.terms(output.x, batch, loss=self, **options)

    def depends_on_place(self, config: ModelConfig) -> bool:
        return config.head.depends_on_place

    def reported(self) -> "LossConfig":
        return LossConfig(kind=self.kind, chunk_tokens=self.chunk_tokens)


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


def total_weights(loss: Loss, config: ModelConfig, batch: Batch) -> Totals:
    """What the terms of the loss are divided by: the sum of the weights of each, over the whole batch."""
    return jax.tree.map(lambda weight: jnp.maximum(jnp.sum(weight), 1), loss.weights(config, batch))


def any_order(loss: Loss, config: ModelConfig) -> bool:
    """Whether nothing in the loss depends on where in its row a token lies, except through its position.

    The loss and the parts of the layers say so.
    """
    blocks = [block for stack in config.stacks.values() for block in stack.distinct]
    parts = [part for block in blocks for part in (block.mixer, block.feedforward) if part is not None]
    return not loss.depends_on_place(config) and not any(part.depends_on_place for part in parts)


def batch_loss(
    loss: Loss,
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
      loss: what is minimised.
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
    totals = total_weights(loss, model.config, batch) if totals is None else totals
    model_key, head_key = model.config.dropout_keys(by_row(dropout_key, batch), 2)
    with reordered(loss, model.config, batch, model_key) as batch:
        output = model.run(batch, model_key)
    objective, sums, weights = summed(loss.terms(model, output, batch, head_key), totals)
    objective += share * router_objective(model.config, output.stats)
    return objective, BatchLoss(sums, weights, jax.tree.map(lambda mean: share * mean, output.stats))


def by_row(dropout_key: PRNGKeyArray | None, batch: Batch) -> PRNGKeyArray | None:
    """A key for each row of the batch."""
    single = dropout_key is not None and dropout_key.ndim == 0
    return row_keys(dropout_key, next(iter(batch.values())).shape[0]) if single else dropout_key


def reordered(
    loss: Loss, config: ModelConfig, batch: Batch, dropout_key: PRNGKeyArray | None
) -> contextlib.AbstractContextManager[Batch]:
    """The batch in the order of tokens that balances the devices of long rows, where that changes nothing else."""
    return balanced(batch) if dropout_key is None and any_order(loss, config) else contextlib.nullcontext(batch)


def summed(
    terms: dict[str, Term], totals: Totals
) -> tuple[Float[Array, ""], dict[str, dict[str, Float[Array, ""]]], Totals]:
    """What is differentiated, and sums and weights as in `BatchLoss`."""
    objective = sum(term.objective / totals[name] for name, term in terms.items())
    sums = {name: term.metrics for name, term in terms.items()}
    return objective, sums, {name: term.weight for name, term in terms.items()}
