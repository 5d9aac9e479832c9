"""One call of attention, complete and checked: what every backend receives."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of `attention`, with its defaults filled in."""

    q: Float[Array, "batch q_length heads head_dim"]
    k: Float[Array, "batch kv_length kv_heads head_dim"]
    v: Float[Array, "batch kv_length kv_heads head_dim"]
    mask: MaskSpec
    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]]
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None
    scale: float
    soft_cap: float | None
    dropout_rate: float
    dropout_key: Array | None

    def __post_init__(self):
        if self.q.ndim != 4 or self.k.shape != self.v.shape or self.q.shape[::3] != self.k.shape[::3]:
            raise UserError(
                f"attention: q {self.q.shape}, k {self.k.shape} and v {self.v.shape} do not fit: each is [batch, "
                "length, heads, head_dim], and only q may have a length and a number of heads of its own."
            )
        num_heads, num_kv_heads = self.q.shape[2], self.k.shape[2]
        if num_heads % num_kv_heads:
            raise UserError(
                f"attention: {num_heads} query heads cannot share {num_kv_heads} key heads evenly: "
                "choose a number of key heads that divides the number of query heads."
            )
        self._check_lengths("positions", self.positions, (1, self.q.shape[0]))
        self._check_lengths("segment_ids", self.segment_ids, (self.q.shape[0],))
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
