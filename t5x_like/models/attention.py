"""Multi-head, grouped-query and multi-query self-attention."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.door import attention
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import Initializer, Linear, Module
from t5x_like.models.positions import RotaryConfig, rotate


@configurable
class AttentionConfig:
    """Self-attention (Vaswani et al. 2017; grouped queries: Ainslie et al. 2023).

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads; None: num_heads
        (multi-head); 1 is multi-query.
      head_dim: size of a head; None: d_model / num_heads.
      rotary: rotary positions of queries and keys; None: no positions in attention.
      window: tokens that each token sees, itself the last of them (sliding window, Beltagy et al. 2020); None: all.
      qk_norm: normalisation of queries and of keys, before the rotation (Henry et al. 2020); None: none.
      qk_norm_dims: what `qk_norm` normalises together: each `head` (Qwen 3), or `all_heads` of a token (OLMo 2).
      use_qkv_bias: biases on the projections to queries, keys and values.
      use_out_bias: a bias on the output projection.
      dropout_rate: dropout of the attention probabilities while training.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotary: RotaryConfig | None = None
    window: int | None = None
    qk_norm: NormConfig | None = None
    qk_norm_dims: Literal["head", "all_heads"] = "head"
    use_qkv_bias: bool = False
    use_out_bias: bool = False
    dropout_rate: float = 0.0

    def __post_init__(self):
        for name in ("num_heads", "num_kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"AttentionConfig.{name} is {value}: it must be at least 1.")
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"AttentionConfig.num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.kv_heads}): "
                "every key-value head serves the same number of query heads."
            )
        if self.qk_norm is None and self.qk_norm_dims != "head":
            raise UserError(
                f"AttentionConfig.qk_norm_dims is {self.qk_norm_dims!r} without qk_norm: set AttentionConfig.qk_norm."
            )
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"AttentionConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")
        if self.rotary and self.head_dim and self.head_dim % 2:
            raise UserError(f"AttentionConfig.head_dim is {self.head_dim}: rotary positions need an even head_dim.")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def head_size(self, d_model: int) -> int:
        """head_dim, derived from d_model where it is not given."""
        if self.head_dim:
            return self.head_dim
        if d_model % self.num_heads:
            raise UserError(
                f"d_model ({d_model}) is not a multiple of AttentionConfig.num_heads ({self.num_heads}): "
                "change one of them, or set AttentionConfig.head_dim."
            )
        size = d_model // self.num_heads
        if self.rotary and size % 2:
            raise UserError(f"head_dim is {size} (d_model / num_heads): rotary positions need an even head_dim.")
        return size


class Attend(Protocol):
    """The core of a self-attention layer: queries, keys and values of new tokens in, their outputs and state out.

    Training attends among the new tokens and has no state (None); decoding also reads and writes the layer's cache.
    `options` are the layer's own arguments for `kernels.attention.door.attention`.
    """

    def __call__(
        self,
        q: Float[Array, "batch length heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        state: Any,
        **options: Any,
    ) -> tuple[Float[Array, "batch length heads head_dim"], Any]: ...


def attend_within(segment_ids: Int[Array, "batch length"] | None) -> Attend:
    """Attention among the tokens of the batch: the training path."""
    pair = None if segment_ids is None else (segment_ids, segment_ids)

    def attend(q, k, v, state, **options):
        return attention(q, k, v, segment_ids=pair, **options), state

    return attend


class Attention(Module):
    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        *,
        mask: MaskSpec,
        init: Initializer,
        out_init: Initializer,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        head_dim = config.head_size(d_model)
        heads = {"heads": config.num_heads, "head_dim": head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": head_dim}
        keys = jax.random.split(key, 4)
        project: Callable[..., Linear] = lambda dims, key: Linear(
            {"embed": d_model}, dims, init=init, use_bias=config.use_qkv_bias, dtype=dtype, key=key
        )
        self.query = project(heads, keys[0])
        self.key = project(kv_heads, keys[1])
        self.value = project(kv_heads, keys[2])
        self.out = Linear(
            heads, {"embed": d_model}, init=out_init, use_bias=config.use_out_bias, dtype=dtype, key=keys[3]
        )
        norm: Callable[[int], Norm | None] = lambda num_heads: (
            config.qk_norm and Norm(config.qk_norm, head_dim if config.qk_norm_dims == "head" else num_heads * head_dim)
        )
        self.query_norm, self.key_norm = norm(config.num_heads), norm(config.kv_heads)
        self.config = config
        self.mask = mask if config.window is None else dataclasses.replace(mask, window=(config.window - 1, None))

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        positions: Int[Array, "batch length"],
        attend: Attend,
        state: Any,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        q, k = self.normalize(q, self.query_norm), self.normalize(k, self.key_norm)
        if self.config.rotary:
            q, k = rotate(q, positions, self.config.rotary), rotate(k, positions, self.config.rotary)
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        rate = self.config.dropout_rate if dropout_key is not None else 0.0
        o, state = attend(q, k, v, state, mask=self.mask, dropout_rate=rate, dropout_key=dropout_key)
        return self.out(checkpoint_name(o, "attention")), state

    def normalize(
        self, x: Float[Array, "batch length heads head_dim"], norm: Norm | None
    ) -> Float[Array, "batch length heads head_dim"]:
        if norm is None:
            return x
        if self.config.qk_norm_dims == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
