"""The gradient of the loss of a batch: by differentiating `batch_loss`, or by a schedule that needs the loss inside."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.learning.loss import BatchLoss, Loss, Totals, batch_loss, by_row, reordered, summed, total_weights
from t5x_like.learning.router_losses import router_objective
from t5x_like.models.context import Context, Encoded
from t5x_like.models.feedforward.router_stats import RouterStats
from t5x_like.models.parameters import GraphDef, Params, merge
from t5x_like.models.stack import LayerResults, Vectors
from t5x_like.models.token_loss import Batch
from t5x_like.models.transformer import ModelConfig, Output, Transformer, token_info
from t5x_like.sharding.pipeline.gpipe import num_stages, padded, padding
from t5x_like.sharding.pipeline.one_f_one_b import Pieces, one_forward_one_backward

RowsOfBatch = tuple[Batch, PRNGKeyArray | None, PRNGKeyArray | None]
"""A batch, and the keys of the model and the head."""


def loss_gradient(
    loss: Loss,
    graphdef: GraphDef,
    params: Params,
    batch: Batch,
    dropout_key: PRNGKeyArray | None = None,
    *,
    totals: Totals | None = None,
    share: float = 1.0,
) -> tuple[Params, BatchLoss]:
    """The gradient of `batch_loss` by the parameters, and its results; the arguments are the same.

    Where the mesh has stages and `PipelineConfig.schedule` of the last stack is `1f1b`, routers outside of its scanned
    cycles see one microbatch at a time, as those within do.
    """
    config = merge(graphdef, params).config if num_stages() > 1 else None
    if config is None or not runs_1f1b(config):
        options = {"totals": totals, "share": share}
        gradient = jax.grad(batch_loss, argnums=2, has_aux=True)
        return gradient(loss, graphdef, params, batch, dropout_key, **options)
    totals = total_weights(loss, config, batch) if totals is None else totals
    dropout_key = by_row(dropout_key, batch)
    model_key, head_key = config.dropout_keys(dropout_key, 2)
    with reordered(loss, config, batch, model_key) as batch:
        return _scheduled(loss, config, graphdef, params, (batch, model_key, head_key), totals, share)


def runs_1f1b(config: ModelConfig) -> bool:
    """Whether forward and backward passes take turns where the mesh has stages: the last stack's schedule decides."""
    return list(config.stacks.values())[-1].pipeline.schedule == "1f1b"


def _scheduled(
    loss: Loss,
    config: ModelConfig,
    graphdef: GraphDef,
    params: Params,
    rows: RowsOfBatch,
    totals: Totals,
    share: float,
) -> tuple[Params, BatchLoss]:
    """The last stack by 1F1B; what an encoder computes before it is one piece, which runs again for its gradient."""
    *before, name = config.stacks
    if not before:
        gradient, _, results = _scheduled_stack(loss, config, graphdef, params, rows, None, totals, share)
        return gradient, results
    batch, model_key, head_key = rows
    encoder_key, decoder_key = config.dropout_keys(model_key, 2)
    decoder = params[name]

    def encode(params: Params):
        out = merge(graphdef, {**params, name: decoder})(
            token_info(batch, "encoder"), name="encoder", dropout_key=encoder_key
        )
        stats = {"encoder": out.stats}
        return (out.x, share * router_objective(config, stats)), stats

    encoding = {part: value for part, value in params.items() if part != name}
    (encoded, objective), pull, stats = jax.vjp(jax.checkpoint(encode), encoding, has_aux=True)
    rows = batch, decoder_key, head_key
    gradient, by_encoded, results = _scheduled_stack(loss, config, graphdef, params, rows, encoded, totals, share)
    (by_encoding,) = pull((by_encoded, jnp.ones_like(objective)))
    by_all = {part: jax.tree.map(jnp.add, gradient[part], by_encoding[part]) for part in by_encoding}
    stats = jax.tree.map(lambda mean: share * mean, stats)
    return gradient | by_all, results._replace(stats=stats | results.stats)


def _scheduled_stack(
    loss: Loss,
    config: ModelConfig,
    graphdef: GraphDef,
    params: Params,
    rows: RowsOfBatch,
    encoded: Vectors | None,
    totals: Totals,
    share: float,
) -> tuple[Params, Vectors | None, BatchLoss]:
    """Gradients by the parameters and by an encoder's output, and the results, of the last stack with its ends."""
    name, stack = list(config.stacks.items())[-1]
    count, microbatches = stack.num_cycles, stack.pipeline.num_microbatches
    model = _Model(loss, config, graphdef, name, params[name]["scanned"], totals, share / microbatches)
    rest = {**params, name: {part: value for part, value in params[name].items() if part != "scanned"}}
    results, (by_layers, by_rest, by_encoded) = one_forward_one_backward(
        Pieces(model.first, model.layers, model.last),
        padded(model.scanned, padding(count, num_stages(), 1)),
        rest,
        rows,
        encoded,
        num_microbatches=microbatches,
    )
    cut = lambda tree: jax.tree.map(lambda a: a[:count], tree)
    sums, weights, ended = results.last
    stats = {"scanned": cut(results.layers), "unrolled": results.first | ended}
    stats = jax.tree.map(lambda total: model.share * total, stats)
    gradient = {**by_rest, name: {**by_rest[name], "scanned": cut(by_layers)}}
    return gradient, by_encoded, BatchLoss(sums, weights, {name: stats})


Rest = tuple[Params, Vectors | None]
"""The parameters beside those of the scanned cycles, and what an encoder makes of the rows."""


class _Model(NamedTuple):
    """The three pieces of a model's last stack; see `Pieces`.

    Attributes:
      loss: what is minimised.
      config: of the model.
      graphdef: of the model.
      name: of the stack.
      scanned: parameters of all cycles, of which only the structure is used here.
      totals: what the terms of the loss are divided by.
      share: of a microbatch in the whole.
    """

    loss: Loss
    config: ModelConfig
    graphdef: GraphDef
    name: str
    scanned: Params
    totals: Totals
    share: float

    def first(self, rest: Rest, rows: RowsOfBatch):
        model, context = self.on_stage(rest, rows)
        x, results = model.begin(self.name, context, {})
        return (x, self.routers("unrolled", results)), _stats(results)

    def layers(self, layers: Params, rest: Rest, x: Vectors, rows: RowsOfBatch):
        model, context = self.on_stage(rest, rows)
        stack = getattr(model, self.name)
        count = jax.tree.leaves(layers)[0].shape[0]
        numbers = lax.axis_index("stage") * count + jnp.arange(count)
        is_padded = count * lax.axis_size("stage") > stack.config.num_cycles
        x, results = stack.scan_cycles(x, (layers, {}, numbers), context, padded=is_padded)
        return (x, self.routers("scanned", results)), _stats(results)

    def last(self, rest: Rest, x: Vectors, rows: RowsOfBatch):
        batch, _, head_key = rows
        model, context = self.on_stage(rest, rows)
        x, results = getattr(model, self.name).end(x, context, {})
        terms = self.loss.terms(model, Output(x, context.tokens, {}), batch, head_key)
        objective, *sums = summed(terms, self.totals)
        return objective + self.routers("unrolled", results), (*sums, _stats(results))

    def on_stage(self, rest: Rest, rows: RowsOfBatch) -> tuple[Transformer, Context]:
        """The model with these parameters, and the stack's context on a microbatch."""
        (batch, dropout_key, _), (params, encoded) = rows, rest
        model = merge(self.graphdef, {**params, self.name: {**params[self.name], "scanned": self.scanned}})
        given = None if encoded is None else Encoded(encoded, token_info(batch, "encoder").segment_ids)
        return model, model.context(self.name, token_info(batch, self.config.features), given, dropout_key)

    def routers(self, kind: str, results: LayerResults) -> Float[Array, ""]:
        return self.share * router_objective(self.config, {self.name: {kind: _stats(results)}})


def _stats(results: LayerResults) -> dict[str, RouterStats | None]:
    return {place: result.stats for place, result in results.items()}
