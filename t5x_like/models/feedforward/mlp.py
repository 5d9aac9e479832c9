"""The feed-forward half of a block."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable, inert
from t5x_like.errors import UserError
from t5x_like.kernels.randomness import keep
from t5x_like.models.context import Context
from t5x_like.models.feedforward.feedforward import FeedForward
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.parameters import Linear, Module

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "squared_relu", "tanh"]

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zeroes each element with probability `rate` and scales the rest; the identity without a key.

    The key is one for all, or one per row.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(keep(key, rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


@configurable
class MLPConfig(FeedForward):
    """Two-layer perceptron, optionally gated (Shazeer 2020: SwiGLU is `silu` gated, GeGLU `gelu` gated).

    Attributes:
      d_ff: hidden size.
      activation: `gelu` (erf), `gelu_tanh` (its approximation), `silu`, `relu`, `squared_relu` (So et
        al. 2021), or `tanh`.
      gated: multiplies the activated half by a second, linear projection.
      use_bias: biases on the projections.
      dropout_rate: dropout of the hidden units while training (T5).
    """

    d_ff: int
    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False
    dropout_rate: float = inert(0.0)

    def __post_init__(self):
        if self.d_ff < 1:
            raise UserError(f"MLPConfig.d_ff is {self.d_ff}: it must be at least 1.")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"MLPConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")

    @property
    def uses_dropout(self) -> bool:
        return self.dropout_rate > 0

    def build(self, spec: LayerSpec, key: PRNGKeyArray) -> "MLP":
        return MLP(self, spec, key)


class MLP(Module):
    def __init__(self, config: MLPConfig, spec: LayerSpec, key: PRNGKeyArray):
        inits, embed, mlp = spec.inits, {"embed": spec.d_model}, {"mlp": config.d_ff}
        keys = jax.random.split(key, 3)
        options = {"use_bias": config.use_bias, "dtype": spec.dtype}
        self.up = Linear(embed, mlp, init=inits.inner, key=keys[0], **options)
        self.gate = Linear(embed, mlp, init=inits.inner, key=keys[1], **options) if config.gated else None
        self.down = Linear(mlp, embed, init=inits.out, key=keys[2], **options)
        self.config = config

    def __call__(
        self, x: Float[Array, "batch length embed"], context: Context
    ) -> tuple[Float[Array, "batch length embed"], None]:
        activate = ACTIVATIONS[self.config.activation]
        up = checkpoint_name(self.up(x), "mlp")
        hidden = activate(up) if self.gate is None else activate(checkpoint_name(self.gate(x), "gate")) * up
        return self.down(dropout(hidden, self.config.dropout_rate, context.dropout_key)), None
