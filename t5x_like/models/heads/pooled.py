"""One vector per sequence, and numbers made of it: what the heads of whole sequences share."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.models.feedforward.mlp import ACTIVATIONS, Activation, dropout
from t5x_like.models.heads.head import Head, HeadSpec, IsToken, Vectors, check_dropout
from t5x_like.models.parameters import Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledHeadConfig(Head):
    """One vector per sequence, and numbers made of it.

    Attributes:
      pool: the token whose vector stands for the sequence: the `first` (BERT), the `last` (GPT), or the `mean` of all.
      hidden_activation: activation of a layer [d_model, d_model] before the last one (BERT's pooler: `tanh`); None: no
        such layer.
      use_bias: biases.
      dropout_rate: dropout before the last layer while training.
    """

    pool: Literal["first", "last", "mean"] = "first"
    hidden_activation: Activation | None = "tanh"
    use_bias: bool = True
    dropout_rate: float = 0.0

    def __post_init__(self):
        check_dropout(self, self.dropout_rate)

    @property
    def uses_dropout(self) -> bool:
        return self.dropout_rate > 0


class Pooled(Module):
    """From the vectors of a sequence to `num_outputs` numbers."""

    def __init__(self, config: PooledHeadConfig, num_outputs: int, spec: HeadSpec, key: PRNGKeyArray):
        keys = jax.random.split(key)
        hidden = config.hidden_activation
        self.hidden = hidden and spec.linear({"head_embed": spec.d_model}, config.use_bias, keys[0])
        self.out = spec.linear({"classes": num_outputs}, config.use_bias, keys[1])
        self.config = config

    def __call__(
        self, x: Vectors, is_token: IsToken | None, dropout_key: PRNGKeyArray | None
    ) -> Float[Array, "batch classes"]:
        y = self.pool(x, is_token)
        if self.hidden is not None:
            y = ACTIVATIONS[self.config.hidden_activation](self.hidden(y))
        return self.out(dropout(y, self.config.dropout_rate, dropout_key)).astype(jnp.float32)

    def pool(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch embed"]:
        if self.config.pool == "first":
            return x[:, 0]
        is_token = jnp.ones(x.shape[:2], bool) if is_token is None else is_token
        if self.config.pool == "mean":
            count = jnp.maximum(is_token.sum(axis=1, keepdims=True), 1)
            return (jnp.where(is_token[..., None], x.astype(jnp.float32), 0).sum(axis=1) / count).astype(x.dtype)
        last = jnp.max(jnp.where(is_token, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
