"""Loss, perplexity, bits per byte and next-token accuracy on the whole validation split."""

import math
from collections.abc import Callable, Iterable

import jax

from t5x_like.data.build import Data
from t5x_like.models.losses import Batch, LossConfig, batch_loss
from t5x_like.models.parameters import GraphDef, Params
from t5x_like.sharding.logical import on_devices

EvaluateStep = Callable[[Params, Batch], dict[str, jax.Array]]


def make_evaluate_step(graphdef: GraphDef, loss: LossConfig) -> EvaluateStep:
    """(params, batch) -> sums over the batch's tokens; without dropout, label smoothing or z-loss."""
    plain = LossConfig(kind=loss.kind, chunk_tokens=loss.chunk_tokens)

    def evaluate_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        sums = batch_loss(plain, graphdef, params, batch)
        return {"loss": sums.loss, "weight": sums.weight, "correct": sums.correct}

    return evaluate_step


def make_validation(
    graphdef: GraphDef, loss: LossConfig, data: Data, target: Batch, num_batches: int | None = None
) -> Callable[[Params], dict[str, float]]:
    """A function that scores parameters on the validation split.

    Args:
      graphdef: of the model.
      loss: of training.
      data: with the split.
      target: shapes and shardings of a batch.
      num_batches: how many batches to take; None: the whole split.
    """
    step = jax.jit(make_evaluate_step(graphdef, loss))
    total = data.validation.num_batches
    count = min(num_batches or total, total)
    # Spread over the split: neighbours are alike.
    numbers = [index * total // count for index in range(count)]

    def validate(params: Params) -> dict[str, float]:
        batches = (on_devices(data.validation.batch(number), target) for number in numbers)
        return evaluate(step, params, batches, data.bytes_per_token)

    return validate


def evaluate(step: EvaluateStep, params: Params, batches: Iterable[Batch], bytes_per_token: float) -> dict[str, float]:
    """Metrics over `batches`, every token weighing the same.

    Returns:
      loss: nats per token; perplexity: exp(loss); bits_per_byte: loss / ln 2 / bytes_per_token, comparable between
      tokenizers; accuracy: share of tokens whose most likely prediction is right; num_tokens.
    """
    # Summed on the host in double precision; a device value is fetched only after the next batch has been sent.
    totals = {"loss": 0.0, "weight": 0.0, "correct": 0.0}
    pending = None
    for batch in batches:
        sums = step(params, batch)
        if pending is not None:
            add_to(totals, pending)
        pending = sums
    assert pending is not None, "a validation split has at least one batch"
    add_to(totals, pending)
    loss = totals["loss"] / totals["weight"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "accuracy": totals["correct"] / totals["weight"],
        "num_tokens": totals["weight"],
    }


def add_to(totals: dict[str, float], sums: dict[str, jax.Array]) -> None:
    for name, value in jax.device_get(sums).items():
        totals[name] += float(value)
