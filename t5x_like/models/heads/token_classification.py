"""A class for each token: names in a text, parts of speech (BERT, section 5.3)."""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.data.tasks.task import Task
from t5x_like.models.feedforward.mlp import dropout
from t5x_like.models.heads.head import (
    Head,
    HeadModule,
    HeadSpec,
    IsToken,
    Vectors,
    check_classes,
    check_dropout,
    check_labels,
    classification,
)
from t5x_like.models.token_loss import Batch, Term


@configurable
class TokenClassificationHeadConfig(Head):
    """A class for each token: `..._target_classes` and `..._loss_weights` [batch, length].

    Attributes:
      num_classes: number of classes.
      use_bias: a bias per class.
      dropout_rate: dropout before the projection while training.
    """

    num_classes: int
    use_bias: bool = True
    dropout_rate: float = 0.0

    depends_on_place = False

    def __post_init__(self):
        check_classes(self, self.num_classes)
        check_dropout(self, self.dropout_rate)

    @classmethod
    def target(cls, side: str) -> str:
        return f"{side}_target_classes"

    @property
    def uses_dropout(self) -> bool:
        return self.dropout_rate > 0

    def weights(self, batch: Batch, side: str) -> dict[str, Float[Array, "..."]]:
        return {"tokens": batch[f"{side}_loss_weights"]}

    def build(self, spec: HeadSpec, key: PRNGKeyArray) -> HeadModule:
        return TokenClassificationHead(self, spec, key)

    def check(self, objective: str, features: Collection[str], tasks: Sequence[Task]) -> None:
        check_labels(self, self.num_classes, tasks)


class TokenClassificationHead(HeadModule):
    def __init__(self, config: TokenClassificationHeadConfig, spec: HeadSpec, key: PRNGKeyArray):
        self.out = spec.linear({"classes": config.num_classes}, config.use_bias, key)
        self.features, self.dropout_rate = spec.features, config.dropout_rate

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.scores(dropout(x, self.dropout_rate, dropout_key))
        labels, weights = (batch[f"{self.features}_{name}"] for name in ("target_classes", "loss_weights"))
        return {"tokens": classification("", scores, labels, weights)}

    def scores(self, x: Vectors) -> Float[Array, "batch length classes"]:
        return self.out(x).astype(jnp.float32)

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch length classes"]:
        return self.scores(x)
