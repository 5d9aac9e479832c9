"""The first and the last token of an answer in a text (BERT, section 4.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.models.heads.head import Head, HeadModule, HeadSpec, IsToken, Vectors, classification
from t5x_like.models.token_loss import Term


@configurable
class SpanHeadConfig(Head):
    """The first and the last token of an answer in a text (SQuAD).

    The batch has `span_starts`, `span_ends` and `label_weights` [batch].

    Attributes:
      use_bias: biases.
    """

    use_bias: bool = True

    @classmethod
    def target(cls, side: str) -> str:
        return "span_starts"

    def build(self, spec: HeadSpec, key: PRNGKeyArray) -> HeadModule:
        return SpanHead(self, spec, key)


class SpanHead(HeadModule):
    def __init__(self, config: SpanHeadConfig, spec: HeadSpec, key: PRNGKeyArray):
        self.out = spec.linear({"classes": 2}, config.use_bias, key)

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.predict(x, is_token)
        starts, ends, weights = batch["span_starts"], batch["span_ends"], batch["label_weights"]
        start, end = (classification("", scores[..., i], labels, weights) for i, labels in enumerate((starts, ends)))
        exact = (scores[..., 0].argmax(axis=-1) == starts) & (scores[..., 1].argmax(axis=-1) == ends)
        objective = (start.objective + end.objective) / 2
        metrics = {"loss": objective, "accuracy": jnp.sum(weights * exact)}
        return {"sequences": Term(objective, start.weight, metrics)}

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch length 2"]:
        scores = self.out(x).astype(jnp.float32)
        return scores if is_token is None else jnp.where(is_token[..., None], scores, -1e9)
