"""What routers did in a call: sums over a device's tokens, and means over all."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class RouterStats(NamedTuple):
    """What a router did, in float32, over the real tokens of a whole call, however the mesh splits them.

    Attributes:
      load_balance: Switch's loss (section 2.2): num_experts * sum over experts of the share of tokens that chose it
        times its mean probability; experts_per_token when balanced.
      z_loss: mean of the squared logarithm of the sum of the exponentials of the logits (ST-MoE, section 3.1).
      entropy: mean entropy of a token's probabilities, in nats.
      dropped: share of the assignments to experts that found no place; of a router of expert choice, the share of the
        tokens that no expert chose.
      load: each expert's share of all assignments, dropped ones too.
    """

    load_balance: Float[Array, ""]
    z_loss: Float[Array, ""]
    entropy: Float[Array, ""]
    dropped: Float[Array, ""]
    load: Float[Array, "experts"]


class RouterSums(NamedTuple):
    """Over tokens; `offered` is what `dropped` is a share of, and the others as in `RouterStats`."""

    tokens: Float[Array, ""]
    probabilities: Float[Array, "experts"]
    squared_log_normalizers: Float[Array, ""]
    entropies: Float[Array, ""]
    assigned: Float[Array, "experts"]
    dropped: Float[Array, ""]
    offered: Float[Array, ""]

    def means(self) -> RouterStats:
        tokens = jnp.maximum(self.tokens, 1)
        balance = jnp.sum(self.assigned / tokens * self.probabilities / tokens) * len(self.assigned)
        return RouterStats(
            load_balance=balance,
            z_loss=self.squared_log_normalizers / tokens,
            entropy=self.entropies / tokens,
            dropped=self.dropped / jnp.maximum(self.offered, 1),
            load=self.assigned / jnp.maximum(jnp.sum(self.assigned), 1),
        )
