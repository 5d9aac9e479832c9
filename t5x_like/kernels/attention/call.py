"""One call of attention, complete and checked: what every backend receives."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.masks import MaskSpec


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of `attention`, with its defaults filled in.

    `offsets` are the first positions of queries and keys where both are consecutive; else None.
    """

    q: Float[Array, "batch q_length heads head_dim"]
    k: Float[Array, "batch kv_length kv_heads head_dim"]
    v: Float[Array, "batch kv_length kv_heads v_dim"]
    mask: MaskSpec
    positions: tuple[Int[Array, "#batch q_length"], Int[Array, "#batch kv_length"]]
    offsets: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None
    relative_bias: tuple[RelativeBias, Float[Array, "heads num_buckets"]] | None
    alibi_slopes: Float[Array, "heads"] | None
    bias: Float[Array, "#batch #heads #q_length #kv_length"] | None
    sinks: Float[Array, "heads"] | None
    scale: float
    soft_cap: float | None
    dropout_rate: float
    dropout_key: Array | None
    return_lse: bool

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """Shape of the logits: batch, heads, q_length, kv_length."""
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1])

    def __post_init__(self):
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
        self._check_lengths("positions", self.positions, (1, self.q.shape[0]))
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
            spec, given["relative_bias"] = self.relative_bias
            expected["relative_bias"] = (num_heads, spec.num_buckets)
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
