"""The role of a mixer: the part of a block in which tokens see each other."""

import abc
from typing import Any

from jaxtyping import PRNGKeyArray

from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.parameters import Module


class Mixer(abc.ABC):
    """The role of a mixer.

    Attributes:
      num_heads: heads, which the mesh's `tensor` axis splits; None: it has none.
      uses_dropout: whether it draws random numbers while training.
      has_rotary: whether it knows where tokens stand by rotating vectors.
      takes_bias: whether it adds `Context.bias` to products of queries and keys.
      needs_order: whether it counts tokens from the beginning of each segment, and so needs `TokenInfo.order`.
      depends_on_place: whether its result depends on where in its row a token stands, beyond what `TokenInfo` says of
        the token. Then the devices that share a long row get it in its order.
    """

    num_heads: int | None = None
    uses_dropout: bool = False
    has_rotary: bool = False
    takes_bias: bool = False
    needs_order: bool = False
    depends_on_place: bool = True

    @abc.abstractmethod
    def build(self, spec: LayerSpec, key: PRNGKeyArray) -> Module:
        """The layer: `(x, context, state) -> (y, state)`, vectors [batch, length, d_model] in and out."""

    @abc.abstractmethod
    def empty_state(self, batch: int, max_length: int, dtype: str, d_model: int) -> Any:
        """What the layer keeps between the steps of decoding, a tree of arrays, before it has read anything.

        Args:
          batch: rows.
          max_length: tokens of a row that may be read in all.
          dtype: of activations.
          d_model: width of the vectors.
        """

    @abc.abstractmethod
    def forward_flops(self, d_model: int, length: int, *, causal: bool) -> float:
        """FLOPs of a token forward, on average over a sequence, beside those of the layer's parameters."""

    def explicit(self, d_model: int) -> "Mixer":
        """The same with the sizes that it derives."""
        return self

    def check(self, d_model: int) -> None:  # noqa: B027
        """Refuses vectors of a size that does not fit."""

    def exchanged(self, d_model: int) -> int:
        """How many numbers of a token all devices need that share a row (the mesh's `sequence` axis)."""
        return 0
