"""Which key each query may attend to."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from t5x_like.errors import UserError


@dataclass(frozen=True)
class MaskSpec:
    """The static part of an attention mask: rules on the positions of a query and a key; all of them must hold.

    Attributes:
      causal: a key must not come after its query.
      window: how many positions before and after the query a key may lie; None is no limit on that side.
      chunk: a key must lie in the same chunk of so many positions, counted from 0, as its query (Llama 4).
      prefix: `causal` does not hold for the keys at the first `prefix` positions: every query sees them (the prefix
        language model of Raffel et al. 2020, section 3.2.1). Needs `causal`.
    """

    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    chunk: int | None = None
    prefix: int | None = None

    def __post_init__(self):
        if len(self.window) != 2 or any(side is not None and side < 0 for side in self.window):
            raise UserError(f"MaskSpec.window is {self.window}: give (before, after), each None or at least 0.")
        for name in ("chunk", "prefix"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"MaskSpec.{name} is {value}: give None or at least 1.")
        if self.prefix is not None and not self.causal:
            raise UserError(f"MaskSpec.prefix is {self.prefix} without causal: nothing is hidden. Set causal too.")

    def span(self, length: int) -> int:
        """About how many of `length` keys a query sees at most, apart from a prefix."""
        before, after = self.window
        sides = (length if before is None else before, 0 if self.causal else length if after is None else after)
        return min(length, sum(sides) + 1, length if self.chunk is None else self.chunk)


def position_rules(
    mask: MaskSpec, q_positions: Int[Array, "..."], kv_positions: Int[Array, "..."]
) -> list[Bool[Array, "..."]]:
    """The rules of `mask` on positions of queries and keys that broadcast against each other."""
    distance = q_positions - kv_positions
    before, after = mask.window
    rules = []
    if mask.causal:
        rules.append(distance >= 0 if mask.prefix is None else (distance >= 0) | (kv_positions < mask.prefix))
    if before is not None:
        rules.append(distance <= before)
    if after is not None:
        rules.append(distance >= -after)
    if mask.chunk is not None:  # the start of the query's chunk: a division for each position, none for each pair
        start = q_positions - lax.rem(q_positions, jnp.int32(mask.chunk))
        rules += [kv_positions >= start, kv_positions < start + mask.chunk]
    return rules


def segment_rules(q_segments: Int[Array, "..."], kv_segments: Int[Array, "..."]) -> list[Bool[Array, "..."]]:
    """Attention stays within a segment, and segment 0 is padding."""
    return [q_segments == kv_segments, kv_segments != 0]


def allowed(
    mask: MaskSpec,
    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]],
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None,
) -> Bool[Array, "#batch #q_length #kv_length"]:
    """Whether a query may attend to a key: `mask` on their positions, and equal segments other than 0 (padding)."""
    rules = position_rules(mask, positions[0][:, :, None], positions[1][:, None, :])
    if segment_ids is not None:
        rules += segment_rules(segment_ids[0][:, :, None], segment_ids[1][:, None, :])
    result = jnp.ones((1, 1, 1), bool)
    for rule in rules:
        result &= rule
    return result
