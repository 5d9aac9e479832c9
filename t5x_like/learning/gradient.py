"""The gradient of the loss of a batch: by differentiating `batch_loss`, or by a schedule that needs the loss inside."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.learning.loss import BatchLoss, Totals, batch_loss, by_row, head_loss, reordered, total_weights
from t5x_like.learning.router_losses import router_objective
from t5x_like.models.context import Context
from t5x_like.models.feedforward.router_stats import RouterStats
from t5x_like.models.parameters import GraphDef, Params, merge
from t5x_like.models.stack import LayerResults, Vectors
from t5x_like.models.token_loss import Batch, LossConfig
from t5x_like.models.transformer import ModelConfig, Transformer, token_info
from t5x_like.sharding.pipeline.gpipe import num_stages, padded, padding
from t5x_like.sharding.pipeline.one_f_one_b import Pieces, one_forward_one_backward

STACK = "stack"
"""The name of the stack in models that have one."""
RowsOfBatch = tuple[Batch, PRNGKeyArray | None, PRNGKeyArray | None]
"""A batch, and the keys of the model and the head."""


def loss_gradient(
    config: LossConfig,
    graphdef: GraphDef,
    params: Params,
    batch: Batch,
    dropout_key: PRNGKeyArray | None = None,
    *,
    totals: Totals | None = None,
    share: float = 1.0,
) -> tuple[Params, BatchLoss]:
    """The gradient of `batch_loss` by the parameters, and its results; the arguments are the same.

    Where the mesh has stages and `PipelineConfig.schedule` is `1f1b`, routers outside of the scanned cycles see one
    microbatch at a time, as those within do.
    """
    model = merge(graphdef, params)
    if num_stages() == 1 or not runs_1f1b(model.config):
        loss = lambda params: batch_loss(config, graphdef, params, batch, dropout_key, totals=totals, share=share)
        return jax.grad(loss, has_aux=True)(params)
    totals = total_weights(model, batch) if totals is None else totals
    dropout_key = by_row(dropout_key, batch)
    model_key, head_key = model.dropout_keys(dropout_key, 2)
    with reordered(model.config, batch, model_key) as batch:
        return _scheduled(config, graphdef, params, (batch, model_key, head_key), totals, share)


def runs_1f1b(config: ModelConfig) -> bool:
    """Whether forward and backward passes take turns where the mesh has stages."""
    return any(stack.pipeline.schedule == "1f1b" for stack in config.stacks.values())


def _scheduled(
    config: LossConfig, graphdef: GraphDef, params: Params, rows: RowsOfBatch, totals: Totals, share: float
) -> tuple[Params, BatchLoss]:
    stack = merge(graphdef, params).config.stacks[STACK]
    count, microbatches = stack.num_cycles, stack.pipeline.num_microbatches
    model = _Model(config, graphdef, params[STACK]["scanned"], totals, share / microbatches)
    rest = {**params, STACK: {name: part for name, part in params[STACK].items() if name != "scanned"}}
    results, (by_layers, by_rest) = one_forward_one_backward(
        Pieces(model.first, model.layers, model.last),
        padded(model.scanned, padding(count, num_stages(), 1)),
        rest,
        rows,
        num_microbatches=microbatches,
    )
    cut = lambda tree: jax.tree.map(lambda a: a[:count], tree)
    sums, weights, ended = results.last
    stats = {"scanned": cut(results.layers), "unrolled": results.first | ended}
    stats = jax.tree.map(lambda total: model.share * total, stats)
    gradient = {**by_rest, STACK: {**by_rest[STACK], "scanned": cut(by_layers)}}
    return gradient, BatchLoss(sums, weights, {STACK: stats})


class _Model(NamedTuple):
    """The three pieces of a model with one stack; see `Pieces`.

    Attributes:
      loss: of tokens.
      graphdef: of the model.
      scanned: parameters of all cycles, of which only the structure is used here.
      totals: what the terms of the loss are divided by.
      share: of a microbatch in the whole.
    """

    loss: LossConfig
    graphdef: GraphDef
    scanned: Params
    totals: Totals
    share: float

    def first(self, rest: Params, rows: RowsOfBatch):
        batch, *_ = rows
        model, context, embed_key = self.on_stage(rest, rows)
        types = batch.get(f"{model.config.features}_token_types")
        x = model.embed(context.tokens, token_types=types, dropout_key=embed_key)
        x, results = model.stack.begin(x, context, {})
        return (x, self.routers(model, "unrolled", results)), _stats(results)

    def layers(self, layers: Params, rest: Params, x: Vectors, rows: RowsOfBatch):
        model, context, _ = self.on_stage(rest, rows)
        count = jax.tree.leaves(layers)[0].shape[0]
        numbers = lax.axis_index("stage") * count + jnp.arange(count)
        is_padded = count * lax.axis_size("stage") > model.stack.config.num_cycles
        x, results = model.stack.scan_cycles(x, (layers, {}, numbers), context, padded=is_padded)
        return (x, self.routers(model, "scanned", results)), _stats(results)

    def last(self, rest: Params, x: Vectors, rows: RowsOfBatch):
        batch, _, head_key = rows
        model, context, _ = self.on_stage(rest, rows)
        x, results = model.stack.end(x, context, {})
        objective, *sums = head_loss(self.loss, model, x, context.tokens, batch, head_key, self.totals)
        return objective + self.routers(model, "unrolled", results), (*sums, _stats(results))

    def on_stage(self, rest: Params, rows: RowsOfBatch) -> tuple[Transformer, Context, PRNGKeyArray | None]:
        """The model with these parameters, the context of its stack on a microbatch, and the key of its embedding."""
        batch, dropout_key, _ = rows
        model = merge(self.graphdef, {**rest, STACK: {**rest[STACK], "scanned": self.scanned}})
        embed_key, stack_key = model.dropout_keys(dropout_key, 2)
        tokens = model.ordered(token_info(batch, model.config.features))
        return model, model.stack.biased(Context(tokens, dropout_key=stack_key)), embed_key

    def routers(self, model: Transformer, kind: str, results: LayerResults) -> Float[Array, ""]:
        return self.share * router_objective(model.config, {STACK: {kind: _stats(results)}})


def _stats(results: LayerResults) -> dict[str, RouterStats | None]:
    return {place: stats for place, (_, stats) in results.items()}
