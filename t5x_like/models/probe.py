"""A look at activations layer by layer, for debugging; a model that is traced without it holds nothing of it.

What is seen leaves a layer as results do, so that scans, pipelines and meshes treat it like any other value.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

PARTS = ("mixer", "cross_attention", "feedforward", "output")
"""Where a layer is looked at, in the order of computation: what its parts add to the stream, and the stream behind."""


class Size(NamedTuple):
    """Of an activation; means of it over equal shares of the batch are those of the batch.

    Attributes:
      square: mean of the squares.
      bad: share of the values that are not finite.
    """

    square: Float[Array, "*layers"]
    bad: Float[Array, "*layers"]


Sizes = dict[str, Size]
"""By part of a layer."""
StackSizes = dict[str, dict[str, Sizes]]
"""By `scanned` or `unrolled`, then by place, as the parameters of a stack."""

_STACKS: contextvars.ContextVar[list[StackSizes] | None] = contextvars.ContextVar("stacks", default=None)
_LAYER: contextvars.ContextVar[Sizes | None] = contextvars.ContextVar("layer", default=None)


@contextlib.contextmanager
def looking() -> Iterator[list[StackSizes]]:
    """What the stacks traced within show, in the order of computation."""
    stacks = []
    token = _STACKS.set(stacks)
    try:
        yield stacks
    finally:
        _STACKS.reset(token)


@contextlib.contextmanager
def layer_sizes() -> Iterator[Sizes]:
    """What the layer traced within shows; it stays empty where nobody is looking."""
    sizes = {}
    token = _LAYER.set(None if _STACKS.get() is None else sizes)
    try:
        yield sizes
    finally:
        _LAYER.reset(token)


def seen(part: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, a part of the layer being traced, which is shown if anybody is looking."""
    if (sizes := _LAYER.get()) is not None:
        values = x.astype(jnp.float32)
        sizes[part] = Size(jnp.mean(jnp.square(values)), jnp.mean(~jnp.isfinite(values), dtype=jnp.float32))
    return x


def show(sizes: StackSizes) -> None:
    """Shows what the layers of a stack have shown."""
    if (stacks := _STACKS.get()) is not None:
        stacks.append(sizes)
