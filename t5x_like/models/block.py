"""One transformer block: `x + attention(norm(x))`, then `x + feedforward(norm(x))`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable, import_parts, inert
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.randomness import split_keys
from t5x_like.models.context import Context
from t5x_like.models.feedforward.feedforward import FeedForward
from t5x_like.models.feedforward.mlp import dropout
from t5x_like.models.feedforward.router_stats import RouterStats
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.mixers.attention import AttentionConfig, KeysValues
from t5x_like.models.mixers.mixer import Mixer
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import Module
from t5x_like.models.probe import seen
from t5x_like.sharding.logical import constrain


@configurable
class BlockConfig:
    """A transformer block.

    Attributes:
      mixer: the mixing of tokens; None: the block has none, and no norm of it.
      cross_attention: attention to the encoder's output, between `mixer` and `feedforward`: what a decoder's blocks
        have in an encoder-decoder. None: none.
      feedforward: the part that acts on each token alone; None: the block has none, and no norm of it.
      norm: normalisation around each part f of the block; None: none (then see DecoderConfig.residual_init).
      norm_place: `pre`: x + f(norm(x)) (most models); `post`: norm(x + f(x)) (Vaswani et al. 2017, BERT);
        `post_branch`: x + norm(f(x)) (OLMo 2, section 3.2); `sandwich`: x + norm(f(norm(x))) (Gemma 2).
      norm_mixer: False leaves out the norm of `mixer` (the first block of ModernBERT).
      parallel: attention and feed-forward both read the block's input, through one norm (GPT-J, PaLM); `pre` only.
      dropout_rate: dropout of what each part adds to the residual stream, while training.
    """

    mixer: Mixer | None
    cross_attention: AttentionConfig | None = None
    feedforward: FeedForward | None
    norm: Norm | None = NormConfig()
    norm_place: Literal["pre", "post", "post_branch", "sandwich"] = "pre"
    norm_mixer: bool = True
    parallel: bool = False
    dropout_rate: float = inert(0.0)

    def __post_init__(self):
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"BlockConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")
        if self.mixer is None and self.feedforward is None:
            raise UserError("BlockConfig.mixer and BlockConfig.feedforward are both None: give the block one of them.")
        if self.parallel and (self.mixer is None or self.feedforward is None):
            raise UserError("BlockConfig.parallel needs a mixer and a feedforward: set it to False.")
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
        parts = self.mixer, self.cross_attention, self.feedforward
        return self.dropout_rate > 0 or any(part is not None and part.uses_dropout for part in parts)

    @property
    def num_experts(self) -> int | None:
        """Of the feed-forward, if that is a mixture of experts."""
        return None if self.feedforward is None else self.feedforward.num_experts


class BlockState(NamedTuple):
    """What a block keeps between the steps of decoding.

    Attributes:
      mixer: the state of the mixer.
      encoded: keys and values of the encoder's output; None before the first step, or without cross-attention.
    """

    mixer: Any
    encoded: KeysValues | None = None


class Block(Module):
    def __init__(self, config: BlockConfig, spec: LayerSpec, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        sandwich = config.norm_place == "sandwich"
        mixes, crosses, feeds = (
            part is not None for part in (config.mixer, config.cross_attention, config.feedforward)
        )
        norm = lambda used: config.norm.build(spec.d_model) if used and config.norm is not None else None
        self.mixer_norm = norm(mixes and config.norm_mixer)
        self.mixer = config.mixer.build(spec, keys[0]) if mixes else None
        self.mixer_out_norm = norm(mixes and sandwich)
        self.cross_attention_norm = norm(crosses)
        across = dataclasses.replace(spec, mask=MaskSpec())
        self.cross_attention = config.cross_attention.build(across, keys[2]) if crosses else None
        self.cross_attention_out_norm = norm(crosses and sandwich)
        self.feedforward_norm = norm(feeds and not config.parallel)
        self.feedforward = config.feedforward.build(spec, keys[1]) if feeds else None
        self.feedforward_out_norm = norm(feeds and sandwich)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        context: Context,
        state: BlockState | None = None,
    ) -> tuple[Float[Array, "batch length embed"], BlockState | None, RouterStats | None]:
        """The stream behind the block, the block's state, and, of a mixture of experts, its router's statistics."""
        keys = (None,) * 6 if context.dropout_key is None else split_keys(context.dropout_key, 6)
        mixer_state, kept = (None, None) if state is None else state
        stats = None
        mixed_with, fed_with = (context.with_key(keys[0]), mixer_state), (context.with_key(keys[1]),)
        if self.config.parallel:
            y = normalized(x, self.mixer_norm)
            (mixed, mixer_state), (fed, stats) = self.mixer(y, *mixed_with), self.feedforward(y, *fed_with)
            mixed, fed = seen("mixer", mixed), seen("feedforward", fed)
            x = constrain(x + dropout(mixed + fed, self.config.dropout_rate, keys[2]), "batch", "length", "embed")
            return seen("output", x), None if state is None else BlockState(mixer_state, kept), stats
        if self.mixer is not None:
            x, mixer_state = self.add("mixer", x, self.mixer, mixed_with, keys[2])
        if self.cross_attention is not None:
            crossed_with = context.with_key(keys[3]), kept
            x, kept = self.add("cross_attention", x, self.attend_encoded, crossed_with, keys[4])
        if self.feedforward is not None:
            x, stats = self.add("feedforward", x, self.feedforward, fed_with, keys[5])
        return seen("output", x), None if state is None else BlockState(mixer_state, kept), stats

    def add(
        self,
        name: str,
        x: Float[Array, "batch length embed"],
        part: Callable[..., tuple[Float[Array, "batch length embed"], Any]],
        given: tuple[Any, ...],
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Adds a part of the block, which takes what is `given`, to the stream; returns what else the part returns."""
        place, norm, out_norm = self.config.norm_place, getattr(self, f"{name}_norm"), getattr(self, f"{name}_out_norm")
        y, rest = part(normalized(x, norm) if place in ("pre", "sandwich") else x, *given)
        if place in ("post_branch", "sandwich"):
            y = normalized(y, norm if place == "post_branch" else out_norm)
        x = x + dropout(seen(name, y), self.config.dropout_rate, dropout_key)
        return constrain(normalized(x, norm) if place == "post" else x, "batch", "length", "embed"), rest

    def attend_encoded(
        self,
        x: Float[Array, "batch length embed"],
        context: Context,
        kept: KeysValues | None,
    ) -> tuple[Float[Array, "batch length embed"], KeysValues]:
        """Attends to the encoder's output, whose keys and values are returned to be kept while decoding."""
        encoded = context.encoded
        keys_values = self.cross_attention.keys_values(encoded.x) if kept is None else kept
        segment_ids = None
        if encoded.segment_ids is not None:
            own = context.tokens.segment_ids
            segment_ids = jnp.ones(x.shape[:2], jnp.int32) if own is None else own, encoded.segment_ids
        y = self.cross_attention.across(x, keys_values, segment_ids=segment_ids, dropout_key=context.dropout_key)
        return y, keys_values


def normalized(x: Float[Array, "batch length embed"], norm: Module | None) -> Float[Array, "batch length embed"]:
    return x if norm is None else norm(x)


import_parts("t5x_like.models.mixers", "t5x_like.models.feedforward")
