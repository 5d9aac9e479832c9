"""What a stack adds to attention by the distance of query and key: T5's table, ALiBi's slopes."""

import abc

from jaxtyping import PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.biases import RelativeBias, alibi_slopes
from t5x_like.models.context import Bias
from t5x_like.models.parameters import Initializer, Module, parameter


class PositionBias(abc.ABC):
    """The role of a bias on attention that all layers of a stack share."""

    @abc.abstractmethod
    def build(self, num_heads: int, *, bidirectional: bool, init: Initializer, key: PRNGKeyArray) -> Module:
        """The layer that makes the `Bias` of attention with so many heads, from nothing but its parameters."""


@configurable
class RelativeBiasConfig(PositionBias):
    """T5's trainable bias on attention, by the distance of query and key (Raffel et al. 2020, section 2.1).

    Attributes:
      num_buckets: of distances; each has a bias per head, shared by all layers.
      max_distance: from here on all distances are in one bucket.
    """

    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise UserError(f"RelativeBiasConfig.num_buckets is {self.num_buckets}: it must be even and at least 4.")
        if self.max_distance <= self.num_buckets:
            raise UserError(
                f"RelativeBiasConfig.max_distance ({self.max_distance}) must exceed num_buckets ({self.num_buckets})."
            )

    def build(self, num_heads: int, *, bidirectional: bool, init: Initializer, key: PRNGKeyArray) -> Module:
        return BiasTable(self, num_heads, bidirectional, init=init, key=key)


@configurable
class AlibiConfig(PositionBias):
    """A penalty on attention in proportion to distance, another slope for each head (ALiBi, Press et al. 2022)."""

    def build(self, num_heads: int, *, bidirectional: bool, init: Initializer, key: PRNGKeyArray) -> Module:
        return Slopes(num_heads)


class BiasTable(Module):
    def __init__(
        self,
        config: RelativeBiasConfig,
        num_heads: int,
        bidirectional: bool,
        *,
        init: Initializer,
        key: PRNGKeyArray,
    ):
        shape = num_heads, config.num_buckets
        self.table = parameter(init(key, shape, *shape[::-1]), ("heads", "buckets"))
        self.spec = RelativeBias(config.num_buckets, config.max_distance, bidirectional)

    def __call__(self) -> Bias:
        return Bias(table=self.table[...], spec=self.spec)


class Slopes(Module):
    def __init__(self, num_heads: int):
        self.num_heads = num_heads

    def __call__(self) -> Bias:
        return Bias(alibi_slopes=alibi_slopes(self.num_heads))
