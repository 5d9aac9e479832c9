"""One transformer block: `x + attention(norm(x))`, then `x + feedforward(norm(x))`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.randomness import split_keys
from t5x_like.models.feedforward.mlp import MLP, MLPConfig, dropout
from t5x_like.models.feedforward.moe import MoE, MoEConfig
from t5x_like.models.feedforward.routers import RouterStats
from t5x_like.models.mixers.attention import Attend, Attention, AttentionConfig, KeysValues, TokenInfo
from t5x_like.models.mixers.latent_attention import LatentAttention, LatentAttentionConfig
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import Initializers, Module
from t5x_like.models.probe import seen
from t5x_like.sharding.logical import constrain


@configurable
class BlockConfig:
    """A transformer block.

    Attributes:
      mixer: the mixing of tokens.
      cross_attention: attention to the encoder's output, between `mixer` and `feedforward`: what a decoder's blocks
        have in an encoder-decoder. None: none.
      feedforward: the part that acts on each token alone.
      norm: normalisation around each part f of the block; None: none (then see DecoderConfig.residual_init).
      norm_place: `pre`: x + f(norm(x)) (most models); `post`: norm(x + f(x)) (Vaswani et al. 2017, BERT);
        `post_branch`: x + norm(f(x)) (OLMo 2, section 3.2); `sandwich`: x + norm(f(norm(x))) (Gemma 2).
      norm_mixer: False leaves out the norm of `mixer` (the first block of ModernBERT).
      parallel: attention and feed-forward both read the block's input, through one norm (GPT-J, PaLM); `pre` only.
      dropout_rate: dropout of what each part adds to the residual stream, while training.
    """

    mixer: AttentionConfig | LatentAttentionConfig
    cross_attention: AttentionConfig | None = None
    feedforward: MLPConfig | MoEConfig
    norm: NormConfig | None = NormConfig()
    norm_place: Literal["pre", "post", "post_branch", "sandwich"] = "pre"
    norm_mixer: bool = True
    parallel: bool = False
    dropout_rate: float = 0.0

    def __post_init__(self):
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"BlockConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")
        if self.parallel and (self.norm_place != "pre" or self.cross_attention is not None):
            raise UserError("BlockConfig.parallel needs norm_place = 'pre' and no cross_attention: set it to False.")
        if self.cross_attention is not None:
            for name in ("rotary", "window", "chunk"):
                if getattr(self.cross_attention, name) is not None:
                    raise UserError(
                        f"BlockConfig.cross_attention has {name}: it attends to another sequence, whose tokens have no "
                        f"distance from this one's. Leave AttentionConfig.{name} at None there, in a scope of its own."
                    )

    @property
    def uses_dropout(self) -> bool:
        parts = self.mixer, self.cross_attention, self.feedforward, self
        return any(getattr(part, "dropout_rate", 0) or getattr(part, "jitter", 0) for part in parts)


class Encoded(NamedTuple):
    """What a decoder's blocks attend to.

    Attributes:
      x: the encoder's output; None where all layers' states hold their keys and values of it.
      segment_ids: of its tokens; None: one segment, without padding.
    """

    x: Float[Array, "batch kv_length embed"] | None
    segment_ids: Int[Array, "batch kv_length"] | None = None


class BlockState(NamedTuple):
    """What a block keeps between the steps of decoding.

    Attributes:
      mixer: the state of the mixer.
      encoded: keys and values of the encoder's output; None before the first step, or without cross-attention.
    """

    mixer: Any
    encoded: KeysValues | None = None


class Block(Module):
    def __init__(
        self,
        config: BlockConfig,
        d_model: int,
        *,
        mask: MaskSpec,
        inits: Initializers,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        options = {"inits": inits, "dtype": dtype}
        sandwich = config.norm_place == "sandwich"
        norm = lambda used=True: Norm(config.norm, d_model) if used and config.norm is not None else None
        mixer = LatentAttention if isinstance(config.mixer, LatentAttentionConfig) else Attention
        self.mixer_norm = norm(config.norm_mixer)
        self.mixer = mixer(config.mixer, d_model, mask=mask, key=keys[0], **options)
        self.mixer_out_norm = norm(sandwich)
        crosses = config.cross_attention is not None
        self.cross_attention_norm = norm(crosses)
        cross = lambda: Attention(config.cross_attention, d_model, mask=MaskSpec(), key=keys[2], **options)
        self.cross_attention = cross() if crosses else None
        self.cross_attention_out_norm = norm(crosses and sandwich)
        self.feedforward_norm = norm(not config.parallel)
        feedforward = MoE if isinstance(config.feedforward, MoEConfig) else MLP
        self.feedforward = feedforward(config.feedforward, d_model, key=keys[1], **options)
        self.feedforward_out_norm = norm(sandwich)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        tokens: TokenInfo,
        attend: Attend,
        encoded: Encoded | None,
        state: BlockState | None,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch length embed"], BlockState | None, RouterStats | None]:
        """The stream behind the block, the block's state, and, of a mixture of experts, its router's statistics."""
        keys = (None,) * 6 if dropout_key is None else split_keys(dropout_key, 6)
        mixer_state, kept = (None, None) if state is None else state
        mix = lambda y: self.mixer(y, tokens=tokens, attend=attend, state=mixer_state, dropout_key=keys[0])
        if self.config.parallel:
            y = normalized(x, self.mixer_norm)
            (mixed, mixer_state), (fed, stats) = mix(y), self.feed(y, tokens, keys[1])
            mixed, fed = seen("mixer", mixed), seen("feedforward", fed)
            x = constrain(x + dropout(mixed + fed, self.config.dropout_rate, keys[2]), "batch", "length", "embed")
        else:
            x, mixer_state = self.add(x, mix, self.mixer_norm, self.mixer_out_norm, keys[2], "mixer")
            if self.cross_attention is not None:
                cross = lambda y: self.attend_encoded(y, tokens, encoded, kept, keys[3])
                x, kept = self.add(
                    x, cross, self.cross_attention_norm, self.cross_attention_out_norm, keys[4], "cross_attention"
                )
            feed = lambda y: self.feed(y, tokens, keys[1])
            x, stats = self.add(x, feed, self.feedforward_norm, self.feedforward_out_norm, keys[5], "feedforward")
        return seen("output", x), None if state is None else BlockState(mixer_state, kept), stats

    def feed(
        self, x: Float[Array, "batch length embed"], tokens: TokenInfo, dropout_key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch length embed"], RouterStats | None]:
        if isinstance(self.feedforward, MLP):
            return self.feedforward(x, dropout_key), None
        return self.feedforward(x, token_ids=tokens.ids, is_token=tokens.is_token, dropout_key=dropout_key)

    def add(
        self,
        x: Float[Array, "batch length embed"],
        part: Callable[[Float[Array, "batch length embed"]], tuple[Float[Array, "batch length embed"], Any]],
        norm: Norm | None,
        out_norm: Norm | None,
        dropout_key: PRNGKeyArray | None,
        name: str,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Adds a part of the block to the stream; returns what else the part returns beside it."""
        place = self.config.norm_place
        y, rest = part(normalized(x, norm) if place in ("pre", "sandwich") else x)
        if place in ("post_branch", "sandwich"):
            y = normalized(y, norm if place == "post_branch" else out_norm)
        x = x + dropout(seen(name, y), self.config.dropout_rate, dropout_key)
        return constrain(normalized(x, norm) if place == "post" else x, "batch", "length", "embed"), rest

    def attend_encoded(
        self,
        x: Float[Array, "batch length embed"],
        tokens: TokenInfo,
        encoded: Encoded,
        kept: KeysValues | None,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch length embed"], KeysValues]:
        """Attends to the encoder's output, whose keys and values are returned to be kept while decoding."""
        keys_values = self.cross_attention.keys_values(encoded.x) if kept is None else kept
        segment_ids = None
        if encoded.segment_ids is not None:
            own = tokens.segment_ids
            segment_ids = jnp.ones(x.shape[:2], jnp.int32) if own is None else own, encoded.segment_ids
        y = self.cross_attention.across(x, keys_values, segment_ids=segment_ids, dropout_key=dropout_key)
        return y, keys_values


def normalized(x: Float[Array, "batch length embed"], norm: Norm | None) -> Float[Array, "batch length embed"]:
    return x if norm is None else norm(x)
