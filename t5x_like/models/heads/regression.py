"""A number for each sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.models.heads.head import HeadModule, HeadSpec, IsToken, Vectors
from t5x_like.models.heads.pooled import Pooled, PooledHeadConfig
from t5x_like.models.token_loss import Term


@configurable
class RegressionHeadConfig(PooledHeadConfig):
    """A number for each sequence, by mean squared error: `targets` and `label_weights` [batch]."""

    @classmethod
    def target(cls, side: str) -> str:
        return "targets"

    def build(self, spec: HeadSpec, key: PRNGKeyArray) -> HeadModule:
        return RegressionHead(self, spec, key)


class RegressionHead(HeadModule):
    def __init__(self, config: RegressionHeadConfig, spec: HeadSpec, key: PRNGKeyArray):
        self.pooled = Pooled(config, 1, spec, key)

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        predicted, weights = self.pooled(x, is_token, dropout_key)[:, 0], batch["label_weights"]
        error = jnp.sum(weights * jnp.square(predicted - batch["targets"]))
        return {"sequences": Term(error, weights.sum(), {"loss": error})}

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch"]:
        return self.pooled(x, is_token, None)[:, 0]
