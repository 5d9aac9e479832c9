"""Whole models: token ids in, hidden vectors or logits out."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.attention import Attend, attend_within
from t5x_like.models.block import dropout
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import InitializerConfig, Module, parameter
from t5x_like.models.positions import (
    LearnedPositions,
    LearnedPositionsConfig,
    SinusoidalPositionsConfig,
    sinusoidal,
)
from t5x_like.models.stack import Stack, StackConfig
from t5x_like.sharding.logical import constrain


@configurable
class DecoderConfig:
    """A decoder-only language model (GPT, Llama, ...).

    Attributes:
      d_model: width of the residual stream.
      stack: the layers.
      vocab_size: rows of the embedding; None: the tokenizer's vocabulary. A larger number pads it, e.g. to a multiple
        of 128.
      scale_embedding: multiplies the embedded tokens by sqrt(d_model) (Vaswani et al. 2017, section 3.4; Gemma).
      positions: absolute positions added to the embedding; None: none (rotary positions belong to
        AttentionConfig.rotary).
      tie_embeddings: the output projection is the embedding's transpose.
      final_norm: normalisation before the output projection.
      dropout_rate: dropout of the embedded tokens while training.
      kernel_init: how the projections start.
      residual_init: scale of the projections that write into the residual stream: `depth_scaled` divides it by
        sqrt(2 * num_layers), so that the stream's variance does not grow with depth (GPT-2, section 2.3); `same` does
        not.
      embedding_init: how the token and position embeddings and the output projection start.
      dtype: precision of activations and matrix products; parameters, norms, softmax and losses are always float32.
    """

    d_model: int
    stack: StackConfig
    vocab_size: int | None = None
    scale_embedding: bool = False
    positions: LearnedPositionsConfig | SinusoidalPositionsConfig | None = None
    tie_embeddings: bool = True
    final_norm: NormConfig = NormConfig()
    dropout_rate: float = 0.0
    kernel_init: InitializerConfig = InitializerConfig()
    residual_init: Literal["depth_scaled", "same"] = "depth_scaled"
    embedding_init: InitializerConfig = InitializerConfig()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        if self.d_model < 1:
            raise UserError(f"DecoderConfig.d_model is {self.d_model}: it must be at least 1.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"DecoderConfig.vocab_size is {self.vocab_size}: it must be at least 1, or None.")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"DecoderConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")
        if isinstance(self.positions, SinusoidalPositionsConfig) and self.d_model % 2:
            raise UserError(f"DecoderConfig.d_model is {self.d_model}: sinusoidal positions need an even d_model.")
        self.stack.block.attention.head_size(self.d_model)

    @property
    def uses_dropout(self) -> bool:
        block = self.stack.block
        return max(self.dropout_rate, block.dropout_rate, block.attention.dropout_rate) > 0


class Decoder(Module):
    """The model; `embedding` and an untied `head` are both [vocab, embed]."""

    def __init__(self, config: DecoderConfig, key: PRNGKeyArray):
        assert config.vocab_size is not None, "the vocabulary's size is resolved before the model is built"
        keys = jax.random.split(key, 4)
        init = config.embedding_init.build()
        shape = (config.vocab_size, config.d_model)
        self.embedding = parameter(init(keys[0], shape, *shape), ("vocab", "embed"))
        learned = isinstance(config.positions, LearnedPositionsConfig)
        self.positions = LearnedPositions(config.positions, config.d_model, init=init, key=keys[1]) if learned else None
        out_scale = 1 / math.sqrt(2 * config.stack.num_layers) if config.residual_init == "depth_scaled" else 1.0
        self.stack = Stack(
            config.stack,
            config.d_model,
            mask=MaskSpec(causal=True),
            init=config.kernel_init.build(),
            out_init=config.kernel_init.build(scale=out_scale),
            dtype=jnp.dtype(config.dtype),
            key=keys[2],
        )
        self.final_norm = Norm(config.final_norm, config.d_model)
        # Stored as [vocab, embed] like the embedding, so that the loss sees one layout.
        head = None if config.tie_embeddings else init(keys[3], shape, config.d_model, config.vocab_size)
        self.head = None if head is None else parameter(head, ("vocab", "embed"))
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        attend: Attend | None = None,
        states: Any = None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Hidden vectors after the final norm, and what `attend` returned as the layers' states.

        Args:
          tokens: ids in [0, vocab_size).
          positions: of each token within its segment; None: 0, 1, 2, ...
          segment_ids: tokens attend within equal ids only; 0 is padding. None: one segment.
          dropout_key: turns dropout on, where the configuration has any.
          attend: the core of attention; None: among the tokens given (see `models.attention.Attend`).
          states: the layers' states for `attend`, stacked on a leading `layers` dim.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        embed_key = stack_key = None
        if dropout_key is not None and self.config.uses_dropout:
            embed_key, stack_key = jax.random.split(dropout_key)
        x = self.embed(tokens, positions)
        x = constrain(dropout(x, self.config.dropout_rate, embed_key), "batch", "length", "embed")
        x, states = self.stack(
            x,
            positions=positions,
            attend=attend or attend_within(segment_ids),
            states=states,
            dropout_key=stack_key,
        )
        return self.final_norm(x), states

    def embed(
        self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        # Looked up from rows that are whole: rows sharded over the batch's axes would come back in the wrong layout.
        x = constrain(self.embedding[...], "vocab", None)[tokens]
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.config.positions is not None:
            x = x + sinusoidal(self.config.positions, positions, self.config.d_model)
        return x.astype(self.config.dtype)

    def output_embedding(self) -> Float[Array, "vocab embed"]:
        """The output projection, by whose transpose hidden vectors become logits."""
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of all tokens, in float32; the training loss takes them in chunks instead."""
        head = self.output_embedding().astype(self.config.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
