"""One call of attention: made in a layer, mapped over the mesh by sharding/, and run by a backend."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.masks import MaskSpec


@jax.tree_util.register_static
class Start(int):
    """The position of the first of consecutive tokens, known while tracing: so kernels know which blocks to skip."""


Positions = Start | Int[Array, ""] | Int[Array, "#batch length"]
"""Of the queries or of the keys: each one, or the first of consecutive ones."""


class Side(NamedTuple):
    """The queries of a call, or its keys and values.

    Attributes:
      arrays: (q,) or (k, v), [batch, length, heads, head_dim].
      positions: as in `AttentionCall`.
      segment_ids: as in `AttentionCall`.
    """

    arrays: tuple[Array, ...]
    positions: Positions
    segment_ids: Int[Array, "batch length"] | None

    @property
    def length(self) -> int:
        return self.arrays[0].shape[1]

    @property
    def consecutive(self) -> bool:
        return jnp.ndim(self.positions) == 0

    def map(self, function: Callable[[Array], Array]) -> "Side":
        """Applies `function` to all arrays with a length, which is their second dim."""
        change = lambda tree: jax.tree.map(function, tree)
        positions = self.positions if self.consecutive else function(self.positions)
        return Side(change(self.arrays), positions, change(self.segment_ids))

    def each_position(self) -> Int[Array, "#batch length"]:
        if jnp.ndim(self.positions) > 0:
            return self.positions
        return self.positions + jnp.arange(self.arrays[0].shape[1])[None]


_static = lambda default: field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionCall:
    """Multi-head attention: softmax(soft_cap(scale * q k^T + biases) + mask) v.

    Differentiable in q, k, v, table, bias and sinks. A query that may attend to nothing gives zeros and takes part in
    no gradient.

    Attributes:
      q: queries, in the order of their key heads: `heads / kv_heads` neighbours share one key head (GQA, MQA).
      k: keys.
      v: values; their head_dim may differ.
      positions: of queries and keys, the order that `mask`, `relative_bias` and `alibi_slopes` are about. A single
        number stands for consecutive positions from there on. By default both count from 0; that serves packed rows
        too, where only differences within a segment matter (but not `mask.prefix` and `mask.chunk`).
      segment_ids: of queries and keys: attention stays within a segment, and segment 0 is padding.
      table: the parameters of `relative_bias`.
      alibi_slopes: of ALiBi (Press et al. 2022): minus slope * distance is added; no gradient flows to them.
      bias: any other, added to the logits before the soft-cap. Costs memory in proportion to the scores.
      sinks: one more logit per head in the softmax, without a value (gpt-oss).
      dropout_key: random key for dropout, or one per row; which probabilities it drops depends on the backend.
      mask: rules on positions.
      relative_bias: the buckets of T5's bias (Raffel et al. 2020, section 2.1).
      scale: factor on the products, by default head_dim ** -0.5.
      soft_cap: the logits become `soft_cap * tanh(logits / soft_cap)`, before the mask.
      dropout_rate: share of the attention probabilities set to 0; the others are divided by the rest.
      return_lse: whether the natural logarithm of the softmax's denominator is wanted, in float32; a large negative
        number (`logits.MASK_VALUE`) in a row without keys.
      backend: a name in `attention.BACKENDS`, or "auto", which never keeps more than `capabilities.AUTO_MAX_SCORES`
        scores, except for a bias of that size.
    """

    q: Float[Array, "batch q_length heads head_dim"]
    k: Float[Array, "batch kv_length kv_heads head_dim"]
    v: Float[Array, "batch kv_length kv_heads v_dim"]
    positions: tuple[Positions, Positions] = (Start(0), Start(0))
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None = None
    table: Float[Array, "heads num_buckets"] | None = None
    alibi_slopes: Float[Array, "heads"] | None = None
    bias: Float[Array, "#batch #heads #q_length #kv_length"] | None = None
    sinks: Float[Array, "heads"] | None = None
    dropout_key: Array | None = None
    mask: MaskSpec = _static(MaskSpec())
    relative_bias: RelativeBias | None = _static(None)
    scale: float | None = _static(None)
    soft_cap: float | None = _static(None)
    dropout_rate: float = _static(0.0)
    return_lse: bool = _static(False)
    backend: str = _static("auto")

    def replace(self, **changes) -> "AttentionCall":
        return dataclasses.replace(self, **changes)

    @property
    def queries(self) -> Side:
        return Side((self.q,), self.positions[0], self.segment_ids and self.segment_ids[0])

    @property
    def keys(self) -> Side:
        return Side((self.k, self.v), self.positions[1], self.segment_ids and self.segment_ids[1])

    def between(self, queries: Side, keys: Side) -> "AttentionCall":
        """The same of other queries, or to other keys."""
        (q,), (k, v) = queries.arrays, keys.arrays
        ids = None if queries.segment_ids is None else (queries.segment_ids, keys.segment_ids)
        return self.replace(q=q, k=k, v=v, positions=(queries.positions, keys.positions), segment_ids=ids)

    @property
    def each_position(self) -> tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]]:
        return self.queries.each_position(), self.keys.each_position()

    @property
    def offsets(self) -> tuple[int | Int[Array, ""], int | Int[Array, ""]] | None:
        """The first positions of queries and keys where both are consecutive."""
        return self.positions if self.queries.consecutive and self.keys.consecutive else None

    @property
    def known_offsets(self) -> tuple[int, int] | None:
        """The same if they are known while tracing."""
        return self.positions if all(isinstance(side, int) for side in self.positions) else None

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """Shape of the logits: batch, heads, q_length, kv_length."""
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1])

    def check(self):
        """Raises `UserError` if shapes do not fit."""
        fits = self.q.ndim == self.k.ndim == self.v.ndim == 4 and self.k.shape[:3] == self.v.shape[:3]
        if not fits or self.q.shape[::3] != self.k.shape[::3]:
            raise UserError(
                f"attention: q {self.q.shape}, k {self.k.shape} and v {self.v.shape} do not fit: each is [batch, "
                "length, heads, head_dim]; only q may have a length and a number of heads of its own, and only v a "
                "head_dim."
            )
        num_heads, num_kv_heads = self.q.shape[2], self.k.shape[2]
        if num_heads % num_kv_heads:
            raise UserError(
                f"attention: {num_heads} query heads cannot share {num_kv_heads} key heads evenly: "
                "choose a number of key heads that divides the number of query heads."
            )
        self._check_lengths("positions", self.each_position, (1, self.q.shape[0]))
        self._check_lengths("segment_ids", self.segment_ids, (self.q.shape[0],))
        self._check_biases(num_heads)
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"attention: dropout_rate is {self.dropout_rate}: give 0 or more, and less than 1.")
        if self.dropout_rate and self.dropout_key is None:
            raise UserError(f"attention: dropout_rate {self.dropout_rate} needs a dropout_key.")

    def _check_lengths(self, name: str, pair: tuple[Array, Array] | None, batch_sizes: tuple[int, ...]):
        if pair is None:
            return
        for side, array, length in zip(("queries", "keys"), pair, (self.q.shape[1], self.k.shape[1]), strict=True):
            if array.shape not in [(batch, length) for batch in batch_sizes]:
                raise UserError(
                    f"attention: {name} of the {side} have shape {array.shape}: give [batch, length], "
                    f"{(self.q.shape[0], length)}."
                )

    def _check_biases(self, num_heads: int):
        expected = {"alibi_slopes": (num_heads,), "sinks": (num_heads,)}
        given = {name: getattr(self, name) for name in expected}
        if self.relative_bias is not None:
            given["relative_bias"] = self.table
            expected["relative_bias"] = (num_heads, self.relative_bias.num_buckets)
        for name, shape in expected.items():
            if given[name] is not None and given[name].shape != shape:
                raise UserError(f"attention: {name} has shape {given[name].shape}: give {shape}, one row per head.")
        if self.bias is None:
            return
        fits = self.bias.ndim == 4 and all(
            size in (1, full) for size, full in zip(self.bias.shape, self.scores, strict=True)
        )
        if not fits:
            raise UserError(
                f"attention: bias has shape {self.bias.shape}: give [batch, heads, q_length, kv_length], "
                f"{self.scores}, where any may be 1."
            )


def call_of(
    q: Float[Array, "batch q_length heads head_dim"],
    k: Float[Array, "batch kv_length kv_heads head_dim"],
    v: Float[Array, "batch kv_length kv_heads v_dim"],
    *,
    positions: tuple[int | Positions, int | Positions] | None = None,
    relative_bias: tuple[RelativeBias, Float[Array, "heads num_buckets"]] | None = None,
    **fields,
) -> AttentionCall:
    """A call from its fields, with numbers for positions and the table of a relative bias beside its buckets."""
    positions = tuple(Start(side) if isinstance(side, int) else side for side in positions or (0, 0))
    spec, table = relative_bias or (None, None)
    return AttentionCall(q, k, v, positions=positions, relative_bias=spec, table=table, **fields)
