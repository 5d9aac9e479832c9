"""Loss and accuracy on the whole validation split; of language models also perplexity and bits per byte."""

import math
from collections.abc import Callable, Iterable

import jax

from t5x_like.configurable import configurable
from t5x_like.data.build import Data
from t5x_like.data.config import DataConfig
from t5x_like.errors import UserError
from t5x_like.learning.loss import BatchLoss, Loss, LossConfig, batch_loss
from t5x_like.models.parameters import GraphDef, Params
from t5x_like.models.token_loss import Batch
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.logical import local_rows, on_devices
from t5x_like.sharding.mesh import MeshConfig


@configurable
class EvaluateConfig:
    """What a model that no run has trained is evaluated on.

    Attributes:
      data: with the validation split; its text is tokenised with the model's own tokenizer.
      loss: what is computed.
      mesh: how devices share the work.
    """

    data: DataConfig
    loss: Loss = LossConfig()
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)


def check_reads(config: ModelConfig, data: DataConfig) -> None:
    """UserError if batches of the data lack the tokens that the model reads."""
    for side in {config.features, *(["encoder"] if config.reads_inputs else [])}:
        if f"{side}_input_tokens" not in data.features:
            raise UserError(
                f"{type(config).__name__} reads {side}_input_tokens, which DataConfig.objective = "
                f"@{type(data.objective).__name__}() does not give: choose another objective."
            )


EvaluateStep = Callable[[Params, Batch], BatchLoss]


def make_evaluate_step(graphdef: GraphDef, loss: Loss) -> EvaluateStep:
    """(params, batch) -> sums over the batch; without dropout, and without what the loss leaves out then."""
    reported = loss.reported()

    def evaluate_step(params: Params, batch: Batch) -> BatchLoss:
        return batch_loss(reported, graphdef, params, batch)[1]._replace(stats={})

    return evaluate_step


def make_validation(
    graphdef: GraphDef, loss: Loss, data: Data, target: Batch, num_batches: int | None = None
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
    # Every byte of the text is predicted only by what predicts every token.
    bytes_per_token = data.bytes_per_token if data.config.objective.predicts_every_token else None
    total = data.validation.num_batches
    count = min(num_batches or total, total)
    # Spread over the split: neighbours are alike.
    numbers = [index * total // count for index in range(count)]
    rows = local_rows(target)

    def validate(params: Params) -> dict[str, float]:
        batches = (on_devices(data.validation.batch(number, rows), target) for number in numbers)
        return evaluate(step, params, batches, bytes_per_token)

    return validate


def evaluate(
    step: EvaluateStep, params: Params, batches: Iterable[Batch], bytes_per_token: float | None
) -> dict[str, float]:
    """Metrics over `batches`, every token (or sequence) weighing the same.

    Returns:
      The means of the head's metrics, among them `loss`, and what they are over, e.g. `num_tokens`. Of models that
      predict tokens also `perplexity`, exp(loss), and, where `bytes_per_token` is known, `bits_per_byte`: loss / ln 2 /
      bytes_per_token, comparable between tokenizers.
    """
    # Summed on the host in double precision; a device value is fetched only after the next batch has been sent.
    total = pending = None
    for batch in batches:
        results = step(params, batch)
        if pending is not None:
            total = added(total, pending)
        pending = results
    assert pending is not None, "a validation split has at least one batch"
    total = added(total, pending)
    scores = {
        name: value / max(total.weights[term], 1) for term, sums in total.sums.items() for name, value in sums.items()
    }
    scores.pop("z_loss", None)
    if "tokens" in total.weights:
        scores["perplexity"] = math.exp(min(scores["loss"], 700))
        if bytes_per_token is not None:
            scores["bits_per_byte"] = scores["loss"] / math.log(2) / bytes_per_token
    return scores | {f"num_{term}": weight for term, weight in total.weights.items()}


def added(total: BatchLoss | None, results: BatchLoss) -> BatchLoss:
    """Both together, as Python's floats."""
    values = jax.tree.map(float, jax.device_get(results))
    return values if total is None else jax.tree.map(lambda a, b: a + b, total, values)
