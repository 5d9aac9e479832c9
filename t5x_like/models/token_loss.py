"""Losses of tokens: from vectors to sums, without ever holding the scores of the whole batch."""

import dataclasses
from typing import Literal, NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.cross_entropy import LossSums, cross_entropy, squared_error
from t5x_like.sharding.logical import batch_axes, length_shards, vocabulary_axis

Batch = dict[str, Array]
"""Arrays [batch, ...] under T5X's feature names, e.g. `decoder_input_tokens`; see docs/data.md."""


class Term(NamedTuple):
    """One of the losses of a batch, as sums over what it is about: tokens, sequences, pairs.

    Attributes:
      objective: what is differentiated.
      weight: sum of the weights.
      metrics: sums by name, each to be divided by `weight`.
    """

    objective: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """What is minimised per token with weight.

    Attributes:
      kind: `cross_entropy`, or `mean_squared_error`: the square loss of logits against one-hot labels
        (Hui & Belkin 2021).
      label_smoothing: share of the label's probability spread evenly over the vocabulary (Szegedy et al. 2016), in [0,
        1); cross-entropy only.
      z_loss: weight of the squared log-partition function (PaLM, section 5), which keeps logits near zero; T5X uses
        1e-4; cross-entropy only. Reported losses leave it out.
      chunk_tokens: tokens per device whose logits exist at one time; bounds memory, not the result.
    """

    kind: Literal["cross_entropy", "mean_squared_error"] = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int = 2048

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"LossConfig.label_smoothing is {self.label_smoothing}: it must be in [0, 1).")
        if self.z_loss < 0:
            raise UserError(f"LossConfig.z_loss is {self.z_loss}: it must not be negative.")
        if self.chunk_tokens < 1:
            raise UserError(f"LossConfig.chunk_tokens is {self.chunk_tokens}: it must be at least 1.")
        if self.kind != "cross_entropy" and (self.label_smoothing or self.z_loss):
            raise UserError(f"LossConfig.kind is {self.kind}: label_smoothing and z_loss belong to cross_entropy.")


def token_loss(
    config: TokenLoss,
    hidden: Float[Array, "batch length embed"],
    head: Float[Array, "vocab embed"],
    labels: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    soft_cap: float | None = None,
) -> LossSums:
    """Loss sums over the whole batch; differentiate `.objective`.

    Each device works through its own tokens in chunks, with its own share of the vocabulary. The sums are added once at
    the end, as is the gradient of `head`: left to XLA, every chunk's gradient would be reduced over the data axes.
    """
    rows = batch_axes()
    length = ("sequence",) if length_shards() > 1 else ()
    axes = rows + length
    vocab_axis = vocabulary_axis(head.shape[0])

    def local(hidden, head, labels, weights):
        tokens = hidden.reshape(-1, hidden.shape[-1]), head, labels.reshape(-1), weights.reshape(-1)
        options = {"chunk_size": config.chunk_tokens, "vocab_axis": vocab_axis}
        if config.kind == "mean_squared_error":
            sums = squared_error(*tokens, **options)
        else:
            losses = {"z_loss": config.z_loss, "label_smoothing": config.label_smoothing, "soft_cap": soft_cap}
            sums = cross_entropy(*tokens, **losses, **options)
        return lax.psum(sums, axes) if axes else sums

    manual = {*axes, vocab_axis} - {None}
    if not manual:
        return local(hidden, head, labels, weights)
    tokens, share = PartitionSpec(rows or None, length or None), PartitionSpec(vocab_axis)
    specs = {"in_specs": (tokens, share, tokens, tokens), "out_specs": PartitionSpec()}
    sharded = jax.shard_map(local, axis_names=manual, **specs)
    return sharded(hidden, head, labels, weights)
