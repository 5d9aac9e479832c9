"""One transformer block: `x + attention(norm(x))`, then `x + feedforward(norm(x))`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.attention import Attend, Attention, AttentionConfig
from t5x_like.models.feedforward import MLP, MLPConfig
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import Initializer, Module
from t5x_like.sharding.logical import constrain


@configurable
class BlockConfig:
    """A transformer block.

    Attributes:
      attention: the mixing of tokens.
      feedforward: the part that acts on each token alone.
      norm: normalisation of each of the two.
      norm_place: `before`: x + f(norm(x)) (pre-norm, most models); `after`: x + norm(f(x)) (OLMo 2, section 3.2).
      dropout_rate: dropout of what attention and feed-forward add to the residual stream, while training.
    """

    attention: AttentionConfig
    feedforward: MLPConfig
    norm: NormConfig = NormConfig()
    norm_place: Literal["before", "after"] = "before"
    dropout_rate: float = 0.0

    def __post_init__(self):
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"BlockConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zeroes each element with probability `rate` and scales the rest; the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Block(Module):
    def __init__(
        self,
        config: BlockConfig,
        d_model: int,
        *,
        mask: MaskSpec,
        init: Initializer,
        out_init: Initializer,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        attention_key, feedforward_key = jax.random.split(key)
        options = {"init": init, "out_init": out_init, "dtype": dtype}
        self.attention_norm = Norm(config.norm, d_model)
        self.attention = Attention(config.attention, d_model, mask=mask, key=attention_key, **options)
        self.feedforward_norm = Norm(config.norm, d_model)
        self.feedforward = MLP(config.feedforward, d_model, key=feedforward_key, **options)
        self.dropout_rate = config.dropout_rate
        self.norm_before = config.norm_place == "before"

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        positions: Int[Array, "batch length"],
        attend: Attend,
        state: Any,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        y = self.attention_norm(x) if self.norm_before else x
        y, state = self.attention(y, positions=positions, attend=attend, state=state, dropout_key=keys[0])
        y = y if self.norm_before else self.attention_norm(y)
        x = constrain(x + dropout(y, self.dropout_rate, keys[1]), "batch", "length", "embed")
        y = self.feedforward(self.feedforward_norm(x) if self.norm_before else x)
        y = y if self.norm_before else self.feedforward_norm(y)
        x = constrain(x + dropout(y, self.dropout_rate, keys[2]), "batch", "length", "embed")
        return x, state
