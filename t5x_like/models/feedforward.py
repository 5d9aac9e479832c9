"""The feed-forward half of a block."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.models.parameters import Initializer, Linear, Module

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "squared_relu"]

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


@configurable
class MLPConfig:
    """Two-layer perceptron, optionally gated (Shazeer 2020: SwiGLU is `silu` gated, GeGLU `gelu` gated).

    Attributes:
      d_ff: hidden size.
      activation: `gelu` (erf), `gelu_tanh` (its approximation), `silu`, `relu`, or `squared_relu` (So et al. 2021).
      gated: multiplies the activated half by a second, linear projection.
      use_bias: biases on the projections.
    """

    d_ff: int
    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False

    def __post_init__(self):
        if self.d_ff < 1:
            raise UserError(f"MLPConfig.d_ff is {self.d_ff}: it must be at least 1.")


class MLP(Module):
    def __init__(
        self,
        config: MLPConfig,
        d_model: int,
        *,
        init: Initializer,
        out_init: Initializer,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        embed, mlp = {"embed": d_model}, {"mlp": config.d_ff}
        keys = jax.random.split(key, 3)
        options = {"use_bias": config.use_bias, "dtype": dtype}
        self.up = Linear(embed, mlp, init=init, key=keys[0], **options)
        self.gate = Linear(embed, mlp, init=init, key=keys[1], **options) if config.gated else None
        self.down = Linear(mlp, embed, init=out_init, key=keys[2], **options)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        activate = ACTIVATIONS[self.activation]
        up = checkpoint_name(self.up(x), "mlp")
        if self.gate is None:
            return self.down(activate(up))
        return self.down(activate(checkpoint_name(self.gate(x), "gate")) * up)
