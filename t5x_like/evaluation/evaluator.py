"""Loss, perplexity, bits per byte and next-token accuracy on the whole validation split."""

import math
from collections.abc import Callable, Iterable

import jax

from t5x_like.models.losses import Batch, LossConfig, batch_loss
from t5x_like.models.parameters import GraphDef, Params

EvaluateStep = Callable[[Params, Batch], dict[str, jax.Array]]


def make_evaluate_step(graphdef: GraphDef, loss: LossConfig) -> EvaluateStep:
    """(params, batch) -> sums over the batch's tokens; without dropout, label smoothing or z-loss."""
    plain = LossConfig(kind=loss.kind, chunk_tokens=loss.chunk_tokens)

    def evaluate_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        sums = batch_loss(plain, graphdef, params, batch)
        return {"loss": sums.loss, "weight": sums.weight, "correct": sums.correct}

    return evaluate_step


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
