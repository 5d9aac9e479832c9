"""The role of a feed-forward: the part of a block that acts on each token alone."""

import abc
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.models.feedforward.router_stats import RouterStats
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.parameters import Module, Params


class FeedForward(abc.ABC):
    """The role of a feed-forward.

    Attributes:
      uses_dropout: whether it draws random numbers while training.
      num_experts: of a mixture of experts, which the mesh's `expert` axis splits; None: it is none.
      depends_on_place: whether what it makes of a token depends on where in the batch the token stands.
    """

    uses_dropout: bool = False
    num_experts: int | None = None
    depends_on_place: bool = False

    @abc.abstractmethod
    def build(self, spec: LayerSpec, key: PRNGKeyArray) -> Module:
        """The layer: `(x, context) -> (y, stats)`; the stats are those of a mixture's router, or None."""

    def share_used(self, path: Sequence[str]) -> float:
        """Which share of a parameter of the layer a token uses, by the parameter's path in the layer."""
        return 1.0

    def router_loss(self, stats: RouterStats) -> Float[Array, "*layers"]:
        """What a router adds to the objective; of several layers at once, with a leading dim."""
        return jnp.zeros(())

    def balanced(self, params: Params, stats: RouterStats) -> Params:
        """The layer's parameters after a step, moved by what the router did rather than by a gradient."""
        return params
