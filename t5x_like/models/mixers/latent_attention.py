"""Multi-head latent attention: keys and values of all heads from one short vector per token."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable, inert
from t5x_like.errors import UserError
from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.models.context import Context
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.mixers.attention import Backend, attended_keys
from t5x_like.models.mixers.cache import Cache, empty_cache
from t5x_like.models.mixers.mixer import Mixer
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import Linear, Module
from t5x_like.models.positions import RotaryConfig, rotate


@configurable
class LatentAttentionConfig(Mixer):
    """Multi-head latent attention (DeepSeek-V2, section 2.1).

    Queries and keys are a part without positions beside a rotated part; the rotated key is one for all heads.

    Attributes:
      num_heads: heads.
      kv_lora_rank: size of the vector from which keys and values are made.
      q_lora_rank: size of the vector from which queries are made; None: they are projected from d_model directly.
      qk_nope_head_dim: size of the part of queries and keys without positions.
      qk_rope_head_dim: size of their rotated part.
      v_head_dim: size of a value.
      rotary: rotary positions.
      scale: factor on the products; None: (qk_nope_head_dim + qk_rope_head_dim) ** -0.5.
      norm: normalisation of the vectors of `q_lora_rank` and `kv_lora_rank`.
      use_bias: biases on the projections from and to d_model.
      dropout_rate: dropout of the attention probabilities while training.
      backend: as AttentionConfig.backend.
    """

    num_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rotary: RotaryConfig = RotaryConfig()
    scale: float | None = None
    norm: Norm = NormConfig()
    use_bias: bool = False
    dropout_rate: float = inert(0.0)
    backend: Backend = inert("auto")

    has_rotary = True
    depends_on_place = False

    def __post_init__(self):
        for name in ("num_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"LatentAttentionConfig.{name} is {value}: it must be at least 1.")
        if self.qk_rope_head_dim % 2 or self.rotary.fraction != 1:
            raise UserError(
                f"LatentAttentionConfig.qk_rope_head_dim is {self.qk_rope_head_dim} with RotaryConfig.fraction "
                f"{self.rotary.fraction}: it must be even, and all of it is rotated."
            )
        if self.scale is not None and self.scale <= 0:
            raise UserError(f"LatentAttentionConfig.scale is {self.scale}: it must be positive, or None.")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"LatentAttentionConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")

    @property
    def uses_dropout(self) -> bool:
        return self.dropout_rate > 0

    @property
    def query_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def head_size(self, d_model: int) -> int:
        """The size of queries and keys, which does not depend on d_model."""
        return self.query_head_dim

    def build(self, spec: LayerSpec, key: PRNGKeyArray) -> "LatentAttention":
        return LatentAttention(self, spec, key)

    def empty_state(self, batch: int, max_length: int, dtype: str, d_model: int) -> Cache:
        shapes = (self.num_heads, self.query_head_dim), (self.num_heads, self.v_head_dim)
        return empty_cache(batch, max_length, dtype, shapes)

    def forward_flops(self, d_model: int, length: int, *, causal: bool) -> float:
        return 2 * self.exchanged(d_model) * attended_keys(length, causal=causal)

    def exchanged(self, d_model: int) -> int:
        return self.num_heads * (self.query_head_dim + self.v_head_dim)


class LatentAttention(Module):
    def __init__(self, config: LatentAttentionConfig, spec: LayerSpec, key: PRNGKeyArray):
        d_model, inits, dtype = spec.d_model, spec.inits, spec.dtype
        keys = jax.random.split(key, 5)
        embed, q_lora_rank = {"embed": d_model}, config.q_lora_rank
        queries = {"heads": config.num_heads, "head_dim": config.query_head_dim}
        kept = {"heads": config.num_heads, "head_dim": config.qk_nope_head_dim + config.v_head_dim}
        values = {"heads": config.num_heads, "head_dim": config.v_head_dim}
        # The vector for keys and values, and behind it the rotated key.
        shared = {"latent": config.kv_lora_rank + config.qk_rope_head_dim}
        project = lambda source, target, key, *, init=inits.kernel, use_bias=False: Linear(
            source, target, init=init, use_bias=use_bias, dtype=dtype, key=key
        )
        self.query_down = q_lora_rank and project(embed, {"latent": q_lora_rank}, keys[0], use_bias=config.use_bias)
        self.query_norm = q_lora_rank and config.norm.build(q_lora_rank)
        self.query = project({"latent": q_lora_rank} if q_lora_rank else embed, queries, keys[1])
        self.kv_down = project(embed, shared, keys[2], use_bias=config.use_bias)
        self.kv_norm = config.norm.build(config.kv_lora_rank)
        self.kv_up = project({"latent": config.kv_lora_rank}, kept, keys[3], init=inits.inner)
        self.out = project(values, embed, keys[4], init=inits.out, use_bias=config.use_bias)
        self.config = config
        self.mask = spec.mask

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        context: Context,
        state: Any = None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        config, heads, positions = self.config, self.config.num_heads, context.tokens.positions
        q = self.query(self.query_norm(self.query_down(x)) if self.query_down else x)
        latent, shared_key = jnp.split(self.kv_down(x), [config.kv_lora_rank], axis=-1)
        plain_key, v = jnp.split(self.kv_up(self.kv_norm(latent)), [config.qk_nope_head_dim], axis=-1)
        plain_query, rotated_query = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        rotated_key = rotate(shared_key[:, :, None], positions, config.rotary)
        rotated_key = jnp.broadcast_to(rotated_key, (*x.shape[:2], heads, config.qk_rope_head_dim))
        q = jnp.concatenate([plain_query, rotate(rotated_query, positions, config.rotary)], axis=-1)
        k = jnp.concatenate([plain_key, rotated_key], axis=-1)
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        call = AttentionCall(
            q,
            k,
            v,
            dropout_key=context.dropout_key,
            mask=self.mask,
            scale=config.scale,
            dropout_rate=config.dropout_rate if context.dropout_key is not None else 0.0,
            backend=config.backend,
        )
        o, state = context.attend(call, state, context.tokens)
        return self.out(o), state
