"""A score for each sequence, learned from pairs of which one is preferred."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.models.heads.head import HeadModule, HeadSpec, IsToken, Vectors
from t5x_like.models.heads.pooled import Pooled, PooledHeadConfig
from t5x_like.models.token_loss import Batch, Term


@configurable
class RewardHeadConfig(PooledHeadConfig):
    """A score for each sequence, by which of two is preferred (Bradley & Terry 1952; Ouyang et al. 2022, section 3.5).

    Rows come in pairs: the preferred one, then the other. `label_weights` [batch] of the first of each pair count.
    """

    compares_rows = True

    @classmethod
    def target(cls, side: str) -> str:
        return "is_preferred"

    def weights(self, batch: Batch, side: str) -> dict[str, Float[Array, "..."]]:
        return {"sequences": batch["label_weights"][::2]}

    def build(self, spec: HeadSpec, key: PRNGKeyArray) -> HeadModule:
        return RewardHead(self, spec, key)


class RewardHead(HeadModule):
    def __init__(self, config: RewardHeadConfig, spec: HeadSpec, key: PRNGKeyArray):
        self.pooled = Pooled(config, 1, spec, key)

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.pooled(x, is_token, dropout_key)[:, 0]
        margin, weights = scores[::2] - scores[1::2], batch["label_weights"][::2]
        objective = -jnp.sum(weights * jax.nn.log_sigmoid(margin))
        metrics = {"loss": objective, "accuracy": jnp.sum(weights * (margin > 0))}
        return {"sequences": Term(objective, weights.sum(), metrics)}

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch"]:
        return self.pooled(x, is_token, None)[:, 0]
