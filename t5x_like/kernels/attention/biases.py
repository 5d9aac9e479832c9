"""Biases of the attention logits that depend on positions alone: T5's relative bias and ALiBi."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError


@dataclass(frozen=True)
class RelativeBias:
    """The static part of T5's relative bias (Raffel et al. 2020, section 2.1): which distances share a parameter.

    Half of the buckets of a side hold one distance each; the others grow logarithmically up to `max_distance`, beyond
    which all distances share the last one.

    Attributes:
      num_buckets: parameters per head.
      max_distance: in positions.
      bidirectional: half of the buckets are for keys after the query; otherwise those keys count as distance 0.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    def __post_init__(self):
        if self.num_buckets < 2 or (self.bidirectional and (self.num_buckets < 4 or self.num_buckets % 2)):
            raise UserError(
                f"RelativeBias.num_buckets is {self.num_buckets}: give at least 2, or, bidirectional, an even number "
                "from 4 on."
            )
        if self.max_distance <= self._num_exact:
            raise UserError(
                f"RelativeBias.max_distance is {self.max_distance}: with {self.num_buckets} buckets it must exceed "
                f"{self._num_exact}, the number of distances with a bucket of their own."
            )

    @property
    def _num_side(self) -> int:
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def _num_exact(self) -> int:
        return self._num_side // 2

    def buckets(self) -> Int[np.ndarray, "distances"]:
        """The bucket of each key position minus query position from -max_distance to max_distance.

        They are constants, so no device's logarithm can move a distance to another bucket.
        """
        relative = np.arange(-self.max_distance, self.max_distance + 1)
        after = self.bidirectional * self._num_side * (relative > 0)
        distance = np.abs(relative) if self.bidirectional else np.maximum(-relative, 0)
        growth = np.log(np.maximum(distance, 1).astype(np.float32) / self._num_exact)
        steps = growth / np.float32(np.log(self.max_distance / self._num_exact)) * (self._num_side - self._num_exact)
        far = np.minimum(self._num_exact + steps.astype(np.int32), self._num_side - 1)
        return (after + np.where(distance < self._num_exact, distance, far)).astype(np.int32)


def relative_bias(
    spec: RelativeBias, table: Float[Array, "heads num_buckets"], relative: Int[Array, "..."]
) -> Float[Array, "heads ..."]:
    """The bias of each head at each key position minus query position."""
    index = jnp.clip(relative, -spec.max_distance, spec.max_distance) + spec.max_distance
    return _take(table, jnp.asarray(spec.buckets())[index])


@jax.custom_vjp
def _take(table: Float[Array, "heads num_buckets"], buckets: Int[Array, "..."]) -> Float[Array, "heads ..."]:
    """`table[:, buckets]`, with a matrix product for a gradient: scatter-add is slow on CPU and TPU."""
    return table.astype(jnp.float32)[:, buckets]


def _take_forward(table, buckets):
    return _take(table, buckets), (table, buckets)


def _take_backward(saved, gradient):
    table, buckets = saved
    chosen = jax.nn.one_hot(buckets.reshape(-1), table.shape[1], dtype=jnp.float32)
    summed = jnp.dot(gradient.reshape(table.shape[0], -1), chosen, precision=jax.lax.Precision.HIGHEST)
    return summed.astype(table.dtype), None


_take.defvjp(_take_forward, _take_backward)


def alibi(slopes: Float[Array, "*heads"], relative: Int[Array, "..."]) -> Float[Array, "..."]:
    """ALiBi (Press et al. 2022): each head's slope times the distance, negative. Both broadcast."""
    return -slopes * jnp.abs(relative).astype(jnp.float32)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "heads"]:
    """The slopes of Press et al. 2022, section 3: geometric from 2 ** (-8 / heads) on.

    Where the number of heads is no power of two, those of the power below, and then every other one of twice as many.
    """
    power = 2 ** int(np.log2(num_heads))
    geometric = lambda count: 2.0 ** (-8 / count * np.arange(1, count + 1))
    return np.concatenate([geometric(power), geometric(2 * power)[::2][: num_heads - power]]).astype(np.float32)


def position_bias(
    spec: RelativeBias | None,
    table: Float[Array, "heads num_buckets"] | None,
    alibi_slopes: Float[Array, "heads"] | None,
    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]],
) -> Float[Array, "#batch heads q_length kv_length"] | None:
    """The sum of both biases, for those that are given."""
    relative = positions[1][:, None, :] - positions[0][:, :, None]
    bias = None if spec is None else jnp.moveaxis(relative_bias(spec, table, relative), 0, 1)
    if alibi_slopes is None:
        return bias
    linear = alibi(alibi_slopes[:, None, None], relative[:, None])
    return linear if bias is None else bias + linear
