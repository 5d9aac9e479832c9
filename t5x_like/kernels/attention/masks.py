"""Which key each query may attend to."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from t5x_like.errors import UserError


@dataclass(frozen=True)
class MaskSpec:
    """The static part of an attention mask: a rule on the positions of a query and a key.

    Attributes:
      causal: a key must not come after its query.
      window: how many positions before and after the query a key may lie; None is no limit on that side.
    """

    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)

    def __post_init__(self):
        if len(self.window) != 2 or any(side is not None and side < 0 for side in self.window):
            raise UserError(f"MaskSpec.window is {self.window}: give (before, after), each None or at least 0.")


def allowed(
    mask: MaskSpec,
    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]],
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None,
) -> Bool[Array, "#batch #q_length #kv_length"]:
    """Whether a query may attend to a key: `mask` on their positions, and equal segments other than 0 (padding)."""
    distance = positions[0][:, :, None] - positions[1][:, None, :]
    before, after = mask.window
    rules = []
    if mask.causal:
        rules.append(distance >= 0)
    if before is not None:
        rules.append(distance <= before)
    if after is not None:
        rules.append(distance >= -after)
    if segment_ids is not None:
        q_segments, kv_segments = segment_ids[0][:, :, None], segment_ids[1][:, None, :]
        rules.append((q_segments == kv_segments) & (kv_segments != 0))
    result = jnp.ones((1, 1, 1), bool)
    for rule in rules:
        result &= rule
    return result
