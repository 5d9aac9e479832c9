"""Multi-head, grouped-query and multi-query attention, within a sequence and across to another."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable, inert
from t5x_like.errors import UserError
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.context import Context
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.mixers.cache import Cache, empty_cache
from t5x_like.models.mixers.mixer import Mixer
from t5x_like.models.norms import Norm
from t5x_like.models.parameters import Linear, Module, parameter
from t5x_like.models.positions import RotaryConfig, rotate
from t5x_like.sharding.attention import attend

Backend = Literal["auto", "tpu", "mosaic_gpu", "triton", "cudnn", "reference", "chunked"]


@configurable
class AttentionConfig(Mixer):
    """Attention (Vaswani et al. 2017; grouped queries: Ainslie et al. 2023).

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads; None: num_heads
        (multi-head); 1 is multi-query.
      head_dim: size of a head; None: d_model / num_heads.
      scale: factor on the products of queries and keys; None: head_dim ** -0.5; T5 has 1.0.
      rotary: rotary positions of queries and keys; None: no positions in attention.
      window: tokens that each token sees (sliding window, Beltagy et al. 2020): where attention is causal, itself and
        those before it; in an encoder, window // 2 on either side. None: all.
      chunk: each token sees only tokens of its own chunk of so many (Llama 4); None: no chunks.
      soft_cap: products become soft_cap * tanh(product / soft_cap) (Gemma 2); None: they stay.
      sinks: one more learned logit per head takes part in the softmax and carries no value (gpt-oss).
      qk_norm: normalisation of queries and of keys, before the rotation (Henry et al. 2020); None: none.
      qk_norm_dims: what `qk_norm` normalises together: each `head` (Qwen 3), or `all_heads` of a token (OLMo 2).
      use_qkv_bias: biases on the projections to queries, keys and values.
      use_out_bias: a bias on the output projection.
      dropout_rate: dropout of the attention probabilities while training.
      backend: the kernel; `auto`: the first that can do what is asked (see docs/kernels.md).
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    scale: float | None = None
    rotary: RotaryConfig | None = None
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    qk_norm: Norm | None = None
    qk_norm_dims: Literal["head", "all_heads"] = "head"
    use_qkv_bias: bool = False
    use_out_bias: bool = False
    dropout_rate: float = inert(0.0)
    backend: Backend = inert("auto")

    takes_bias = True
    depends_on_place = False

    def __post_init__(self):
        for name in ("num_heads", "num_kv_heads", "head_dim", "window", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"AttentionConfig.{name} is {value}: it must be at least 1.")
        for name in ("scale", "soft_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"AttentionConfig.{name} is {value}: it must be positive, or None.")
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
        if self.rotary and self.head_dim:
            self.rotary.rotated_dims(self.head_dim)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def explicit(self, d_model: int) -> "AttentionConfig":
        """The same with the sizes that it derives."""
        return dataclasses.replace(self, num_kv_heads=self.kv_heads, head_dim=self.head_size(d_model))

    @property
    def uses_dropout(self) -> bool:
        return self.dropout_rate > 0

    @property
    def has_rotary(self) -> bool:
        return self.rotary is not None

    @property
    def needs_order(self) -> bool:
        return self.chunk is not None

    def build(self, spec: LayerSpec, key: PRNGKeyArray) -> "Attention":
        return Attention(self, spec, key)

    def check(self, d_model: int) -> None:
        self.head_size(d_model)

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
        if self.rotary:
            self.rotary.rotated_dims(size)
        return size

    def empty_state(self, batch: int, max_length: int, dtype: str, d_model: int) -> Cache:
        return empty_cache(batch, max_length, dtype, ((self.kv_heads, self.head_size(d_model)),) * 2)

    def forward_flops(self, d_model: int, length: int, *, causal: bool) -> float:
        keys = attended_keys(length, causal=causal, window=self.window or self.chunk)
        return 2 * self.num_heads * 2 * self.head_size(d_model) * keys

    def exchanged(self, d_model: int) -> int:
        return 2 * self.kv_heads * self.head_size(d_model)

    def masked(self, mask: MaskSpec) -> MaskSpec:
        """`mask`, narrowed by `window` and `chunk`."""
        if self.window is not None:
            window = (self.window - 1, None) if mask.causal else (self.window // 2,) * 2
            mask = dataclasses.replace(mask, window=window)
        return dataclasses.replace(mask, chunk=self.chunk)


def attended_keys(length: int, *, causal: bool, window: int | None = None) -> float:
    """Returns how many keys a token attends to, on average over a sequence."""
    keys = min(length, window or length)
    # The first tokens of a causal sequence have fewer before them.
    return keys - keys**2 / (2 * length) if causal else keys


KeysValues = tuple[Float[Array, "batch kv_length kv_heads head_dim"], Float[Array, "batch kv_length kv_heads v_dim"]]


class Attention(Module):
    """Queries from one sequence; keys and values from the same, or, in cross-attention, from another."""

    def __init__(self, config: AttentionConfig, spec: LayerSpec, key: PRNGKeyArray):
        d_model, inits, dtype = spec.d_model, spec.inits, spec.dtype
        head_dim = config.head_size(d_model)
        heads = {"heads": config.num_heads, "head_dim": head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": head_dim}
        keys = jax.random.split(key, 4)
        project: Callable[..., Linear] = lambda dims, init, key: Linear(
            {"embed": d_model}, dims, init=init, use_bias=config.use_qkv_bias, dtype=dtype, key=key
        )
        # Products start as large as head_dim ** -0.5 would make them, whatever the scale (T5).
        relative = 1.0 if config.scale is None else head_dim**-0.5 / config.scale
        self.query = project(heads, lambda *args: relative * inits.kernel(*args), keys[0])
        self.key = project(kv_heads, inits.kernel, keys[1])
        self.value = project(kv_heads, inits.inner, keys[2])
        self.out = Linear(
            heads, {"embed": d_model}, init=inits.out, use_bias=config.use_out_bias, dtype=dtype, key=keys[3]
        )
        norm: Callable[[int], Module | None] = lambda num_heads: (
            config.qk_norm and config.qk_norm.build(head_dim * (1 if config.qk_norm_dims == "head" else num_heads))
        )
        self.query_norm, self.key_norm = norm(config.num_heads), norm(config.kv_heads)
        self.sinks = parameter(jnp.zeros(config.num_heads), ("heads",)) if config.sinks else None
        self.config = config
        self.mask = config.masked(spec.mask)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        context: Context,
        state: Any = None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Attends from each token of x to the others."""
        tokens = context.tokens
        keys_values = self.keys_values(x, tokens.positions)
        call = self.call(self.queries(x, tokens.positions), keys_values, context.dropout_key)
        o, state = context.attend(context.bias.added_to(call), state, tokens)
        return self.out(o), state

    def across(
        self,
        x: Float[Array, "batch length embed"],
        keys_values: KeysValues,
        *,
        segment_ids: tuple[Int[Array, "batch length"], Int[Array, "batch kv_length"]] | None,
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "batch length embed"]:
        """Attends from each token of x to those of another sequence, whose keys and values are given."""
        call = self.call(self.queries(x), keys_values, dropout_key).replace(segment_ids=segment_ids)
        return self.out(attend(call)[0])

    def call(
        self,
        q: Float[Array, "batch length heads head_dim"],
        keys_values: KeysValues,
        dropout_key: PRNGKeyArray | None,
    ) -> AttentionCall:
        config = self.config
        return AttentionCall(
            q,
            *keys_values,
            sinks=None if self.sinks is None else self.sinks[...],
            dropout_key=dropout_key,
            mask=self.mask,
            scale=config.scale,
            soft_cap=config.soft_cap,
            dropout_rate=config.dropout_rate if dropout_key is not None else 0.0,
            backend=config.backend,
        )

    def queries(
        self, x: Float[Array, "batch length embed"], positions: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length heads head_dim"]:
        return checkpoint_name(self.rotated(self.normalized(self.query(x), self.query_norm), positions), "query")

    def keys_values(
        self, x: Float[Array, "batch kv_length embed"], positions: Int[Array, "batch kv_length"] | None = None
    ) -> KeysValues:
        """Keys and values of a sequence; without positions they are not rotated."""
        k = self.rotated(self.normalized(self.key(x), self.key_norm), positions)
        return checkpoint_name(k, "key"), checkpoint_name(self.value(x), "value")

    def rotated(
        self, x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"] | None
    ) -> Float[Array, "batch length heads head_dim"]:
        if self.config.rotary is None or positions is None:
            return x
        return rotate(x, positions, self.config.rotary)

    def normalized(
        self, x: Float[Array, "batch length heads head_dim"], norm: Module | None
    ) -> Float[Array, "batch length heads head_dim"]:
        if norm is None:
            return x
        if self.config.qk_norm_dims == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
