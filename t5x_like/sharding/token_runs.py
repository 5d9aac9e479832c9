"""A device's share of the tokens, as runs of consecutive ones, and attention between two such runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from t5x_like.kernels.attention import door
from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.blocks import Tokens, overlap_of_mask, overlap_of_segments
from t5x_like.kernels.attention.masks import MaskSpec

AXIS = "sequence"
"""The axis of the mesh that splits the length."""


class Options(NamedTuple):
    """The static arguments of a call of attention."""

    mask: MaskSpec
    relative_bias: RelativeBias | None
    other: tuple[tuple[str, Any], ...]  # arguments that every piece passes on as they are: scale, soft_cap, backend


class Heads(NamedTuple):
    """What a call of attention knows of each head."""

    table: Float[Array, "heads num_buckets"] | None = None
    alibi_slopes: Float[Array, "heads"] | None = None


class Side(NamedTuple):
    """The queries of a call, or its keys and values.

    Attributes:
      arrays: (q,) or (k, v), [batch, length, heads, head_dim].
      positions: [#batch, length], or the position of the first token where the others follow it.
      segment_ids: as in `attention`.
    """

    arrays: tuple[Array, ...]
    positions: door.Side
    segment_ids: Int[Array, "batch length"] | None

    @property
    def length(self) -> int:
        return self.arrays[0].shape[1]

    @property
    def consecutive(self) -> bool:
        return jnp.ndim(self.positions) == 0

    def map(self, function) -> "Side":
        """Applies `function` to all arrays with a length, which is their second dim."""
        change = lambda tree: jax.tree.map(function, tree)
        positions = self.positions if self.consecutive else function(self.positions)
        return Side(change(self.arrays), positions, change(self.segment_ids))


def to_zigzag(array: Shaped[Array, "batch length ..."], count: int) -> Shaped[Array, "batch length ..."]:
    """Puts the 2 * count chunks of the length in the order 0, the last, 1, the last but one, ...

    Split among `count` devices, each then has an early and a late chunk, whose work under a causal mask adds up to the
    same for all.
    """
    chunks = array.reshape(array.shape[0], 2, count, -1, *array.shape[2:])
    return jnp.stack([chunks[:, 0], jnp.flip(chunks[:, 1], axis=1)], axis=2).reshape(array.shape)


def from_zigzag(array: Shaped[Array, "batch length ..."], count: int) -> Shaped[Array, "batch length ..."]:
    """Inverse of `to_zigzag`."""
    chunks = array.reshape(array.shape[0], count, 2, -1, *array.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], jnp.flip(chunks[:, :, 1], axis=1)], axis=1).reshape(array.shape)


def pieces(side: Side, index: Int[Array, ""], count: int, in_zigzag: bool) -> list[Side]:
    """The runs of consecutive tokens in the share that device `index` of `count` has of a side.

    `side.positions`, if a number, is that of the first token of all.
    """
    starts = [index, 2 * count - 1 - index] if in_zigzag else [index]
    size = side.length // len(starts)
    cut = lambda i: side.map(lambda a: a[:, i * size : (i + 1) * size])
    runs = [cut(i) for i in range(len(starts))]
    if not side.consecutive:
        return runs
    return [run._replace(positions=side.positions + start * size) for run, start in zip(runs, starts, strict=True)]


def attend(
    options: Options, queries: Side, keys: Side, heads: Heads
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]:
    """Attention and its log-sum-exp between two runs of tokens, on one device."""
    table = None if options.relative_bias is None else (options.relative_bias, heads.table)
    ids = (queries.segment_ids, keys.segment_ids)
    return door.attention(
        *queries.arrays,
        *keys.arrays,
        mask=options.mask,
        relative_bias=table,
        alibi_slopes=heads.alibi_slopes,
        positions=(queries.positions, keys.positions),
        segment_ids=None if ids[0] is None else ids,
        return_lse=True,
        **dict(options.other),
    )


def may_attend(mask: MaskSpec, queries: Side, keys: Side) -> Bool[Array, ""] | None:
    """Whether any query may attend to any key; None if there is no rule that could forbid it."""
    if mask == MaskSpec() and queries.segment_ids is None:
        return None
    positions = tuple(
        side.positions + jnp.arange(side.length)[None] if side.consecutive else side.positions
        for side in (queries, keys)
    )
    some = overlap_of_mask(mask, Tokens(positions, None), queries.length, keys.length).some
    if queries.segment_ids is not None:
        some = some & overlap_of_segments((queries.segment_ids, keys.segment_ids), queries.length, keys.length).some
    return some.any()
