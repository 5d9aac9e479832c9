"""Which part of its arrays a program of a Triton kernel sees."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import pallas as pl

from t5x_like.kernels.attention.triton_tiles import Context


@dataclass(frozen=True)
class Specs:
    """Block specs for a kernel; nothing is copied by them: a program gets pointers.

    Attributes:
      place: from grid indices to (row of the batch, block, head, head or group of heads on the other side).
    """

    place: Callable[..., tuple[Any, Any, Any, Any]]

    def _spec(self, shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: index(*self.place(*grid)))

    def tokens(self, block: int, dim: int) -> pl.BlockSpec:
        """A block of [batch length heads dim]."""
        return self._spec((None, block, None, dim), lambda b, i, h, other: (b, i, h, 0))

    def all_tokens(self, array: Any) -> pl.BlockSpec:
        """All tokens of the head on the other side."""
        _, length, _, dim = array.shape
        return self._spec((None, length, None, dim), lambda b, i, h, other: (b, 0, other, 0))

    def group_tokens(self, array: Any, group: int) -> pl.BlockSpec:
        """All tokens of the heads on the other side."""
        _, length, _, dim = array.shape
        return self._spec((None, length, group, dim), lambda b, i, h, other: (b, 0, other, 0))

    def per_token(self, block: int) -> pl.BlockSpec:
        """A block of [batch heads length]."""
        return self._spec((None, None, block), lambda b, i, h, other: (b, h, i))

    def group_per_token(self, array: Any, group: int) -> pl.BlockSpec:
        return self._spec((None, group, array.shape[2]), lambda b, i, h, other: (b, other, 0))

    def per_token_rows(self, block: int, dim: int) -> pl.BlockSpec:
        """A block of [batch heads length dim]."""
        return self._spec((None, None, block, dim), lambda b, i, h, other: (b, h, i, 0))

    def context(self, context: Context) -> Context:
        side = lambda array: self._spec((None, array.shape[1]), lambda b, i, h, other: (_row(array, b), 0))
        whole = lambda array: pl.BlockSpec(array.shape, lambda *grid: (0,) * array.ndim)
        visits = context.visits
        return Context(
            visits=self._spec((None, None, 6), lambda b, i, h, other: (_row(visits, b), i, 0)),
            offsets=whole(context.offsets),
            queries=jax.tree.map(side, context.queries),
            keys=jax.tree.map(side, context.keys),
            strip=jax.tree.map(whole, context.strip),
            slopes=jax.tree.map(whole, context.slopes),
        )


def _row(array: Any, b: Any) -> Any:
    """What is the same for all rows of the batch has one row."""
    return b if array.shape[0] > 1 else 0
