"""A device's share of the tokens, as runs of consecutive ones, and whether two such runs have to do with each other."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from t5x_like.kernels.attention.blocks import Tokens, overlap_of_mask, overlap_of_segments
from t5x_like.kernels.attention.call import AttentionCall, Side
from t5x_like.kernels.attention.masks import MaskSpec

AXIS = "sequence"
"""The axis of the mesh that splits the length."""


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


def may_attend(call: AttentionCall) -> Bool[Array, ""] | None:
    """Whether any query may attend to any key; None if there is no rule that could forbid it."""
    if call.mask == MaskSpec() and call.segment_ids is None:
        return None
    lengths = (call.queries.length, call.keys.length)
    some = overlap_of_mask(call.mask, Tokens(call.each_position, None), *lengths).some
    if call.segment_ids is not None:
        some = some & overlap_of_segments(call.segment_ids, *lengths).some
    return some.any()
