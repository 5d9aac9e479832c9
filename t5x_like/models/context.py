"""What goes down through the layers beside the vectors: facts of tokens, what a decoder attends to, random keys."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.sharding.attention import attend


class TokenInfo(NamedTuple):
    """What layers may know of the tokens whose vectors they get; arrays [batch, length] of integers.

    Attributes:
      positions: of each token within its segment.
      ids: of the vocabulary.
      segment_ids: tokens attend within equal ids only; 0 is padding. None: one segment.
      order: what a causal mask compares, where it is not the place in the row: equal numbers see each other.
      key_mask: 0 where a token may not be attended to; None: nowhere.
      types: in [0, num_token_types); None: 0 everywhere.
    """

    positions: Int[Array, "batch length"]
    ids: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"] | None = None
    order: Int[Array, "batch length"] | None = None
    key_mask: Int[Array, "batch length"] | None = None
    types: Int[Array, "batch length"] | None = None

    @property
    def is_token(self) -> Bool[Array, "batch length"] | None:
        """False for padding; None: there is none."""
        return None if self.segment_ids is None else self.segment_ids != 0


class Encoded(NamedTuple):
    """What a decoder's blocks attend to.

    Attributes:
      x: the encoder's output; None where all layers' states hold their keys and values of it.
      segment_ids: of its tokens; None: one segment, without padding.
    """

    x: Float[Array, "batch kv_length embed"] | None
    segment_ids: Int[Array, "batch kv_length"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
    """What a stack adds to attention by the distance of query and key, the same in all of its layers.

    Attributes:
      table: of T5's biases, by head and bucket of the distance.
      alibi_slopes: of ALiBi, by head.
      spec: how distances become buckets of `table`.
    """

    table: Float[Array, "heads buckets"] | None = None
    alibi_slopes: Float[Array, "heads"] | None = None
    spec: RelativeBias | None = dataclasses.field(default=None, metadata={"static": True})

    def added_to(self, call: AttentionCall) -> AttentionCall:
        return call.replace(relative_bias=self.spec, table=self.table, alibi_slopes=self.alibi_slopes)


@runtime_checkable
class Attend(Protocol):
    """The core of a self-attention layer: a call with queries, keys and values of new tokens in, outputs and state out.

    Training attends among the new tokens and has no state (None); decoding also reads and writes the layer's cache.
    """

    def __call__(
        self, call: AttentionCall, state: Any, tokens: TokenInfo
    ) -> tuple[Float[Array, "batch length heads v_dim"], Any]: ...


def attend_within(
    call: AttentionCall, state: Any, tokens: TokenInfo
) -> tuple[Float[Array, "batch length heads v_dim"], Any]:
    """Attention among the tokens of a batch: the `Attend` of training."""
    segments = keys = tokens.segment_ids
    if tokens.key_mask is not None:
        segments = jnp.ones_like(tokens.key_mask) if segments is None else segments
        keys = segments * tokens.key_mask
    if segments is not None:
        call = call.replace(segment_ids=(segments, keys))
    if tokens.order is not None:
        call = call.replace(positions=(tokens.order, tokens.order))
    return attend(call)[0], state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a stack gets beside the vectors.

    Attributes:
      tokens: whose vectors they are.
      encoded: what a decoder attends to; None: nothing.
      bias: of the positions, for the stack's attention.
      dropout_key: one, or one per row, which a pipeline needs; None: no dropout.
      attend: the core of attention.
      embed_key: as `dropout_key`, for the embedded tokens.
    """

    tokens: TokenInfo
    encoded: Encoded | None = None
    bias: Bias = Bias()
    dropout_key: PRNGKeyArray | None = None
    attend: Attend = dataclasses.field(default=attend_within, metadata={"static": True})
    embed_key: PRNGKeyArray | None = None

    def with_key(self, dropout_key: PRNGKeyArray | None) -> "Context":
        """The same with the key of one part."""
        return dataclasses.replace(self, dropout_key=dropout_key)
