"""Whole models: decoder (GPT), encoder (BERT) and encoder-decoder (T5), from token ids to vectors."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable, import_parts, inert
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.randomness import split_keys
from t5x_like.models.context import Attend, Context, Encoded, TokenInfo, attend_within
from t5x_like.models.feedforward.mlp import dropout
from t5x_like.models.heads.head import Head, HeadSpec
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.norms import Norm
from t5x_like.models.parameters import InitializerConfig, Initializers, Module, parameter
from t5x_like.models.positions import Positions
from t5x_like.models.stack import Stack, StackConfig, StackOutput, States
from t5x_like.models.token_loss import Batch
from t5x_like.sharding.logical import constrain

Ids = Int[Array, "batch length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What all models have.

    Attributes:
      d_model: width of the residual stream.
      vocab_size: rows of the embedding; None: the tokenizer's vocabulary. A larger number pads it, e.g. to a multiple
        of 128.
      scale_embedding: multiplies the embedded tokens by sqrt(d_model) (Vaswani et al. 2017, section 3.4; Gemma).
      positions: absolute positions added to the embedding; None: none (rotary positions belong to
        AttentionConfig.rotary, T5's and ALiBi's biases to StackConfig.position_bias).
      num_token_types: kinds of tokens that have an embedding of their own (BERT: first and second sentence); 0: none.
      embedding_norm: normalisation of the embedded tokens (BERT); None: none.
      head: what becomes of the vectors behind the last layer.
      dropout_rate: dropout of the embedded tokens while training.
      kernel_init: how the projections start.
      residual_init: how those that write into the residual stream start: `depth_scaled` divides them by
        sqrt(2 * num_layers), so that the stream's variance does not grow with depth (GPT-2, section 2.3); `same` as
        `kernel_init`. For blocks without norms: `fixup` starts them at 0 and divides values and first feed-forward
        layers by sqrt(2 * num_layers) (Zhang et al. 2019, without its scalars); `t_fixup` scales all of these by
        0.67 * num_layers ** -0.25, in the decoder of an encoder-decoder by (9 * num_layers) ** -0.25 (Huang et al.
        2020, section 3.2).
      embedding_init: how the token and position embeddings and the output projection start.
      dtype: precision of activations and matrix products; parameters, norms, softmax and losses are always float32.
    """

    d_model: int
    vocab_size: int | None = None
    scale_embedding: bool = False
    positions: Positions | None = None
    num_token_types: int = 0
    embedding_norm: Norm | None = None
    head: Head = LanguageModelHeadConfig()
    dropout_rate: float = inert(0.0)
    kernel_init: InitializerConfig = inert(InitializerConfig())
    residual_init: Literal["depth_scaled", "same", "fixup", "t_fixup"] = inert("depth_scaled")
    embedding_init: InitializerConfig = inert(InitializerConfig())
    dtype: Literal["float32", "bfloat16"] = inert("bfloat16")

    def __post_init__(self):
        name = type(self).__name__
        if self.d_model < 1:
            raise UserError(f"{name}.d_model is {self.d_model}: it must be at least 1.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"{name}.vocab_size is {self.vocab_size}: it must be at least 1, or None.")
        if self.num_token_types < 0:
            raise UserError(f"{name}.num_token_types is {self.num_token_types}: it must not be negative.")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"{name}.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")
        if self.positions is not None:
            self.positions.check(self.d_model)
        for stack_name, stack in self.stacks.items():
            for mixer in stack.mixers:
                mixer.check(self.d_model)
            for block in stack.distinct:
                self._check_cross_attention(stack_name, block.cross_attention is not None)

    def _check_cross_attention(self, stack: str, crosses: bool):
        name, needed = type(self).__name__, stack == "decoder"
        if crosses and not needed:
            raise UserError(
                f"{name}.{stack} has BlockConfig.cross_attention, but no encoder's output to attend to: "
                "set it to None there."
            )
        if needed and not crosses:
            raise UserError(
                f"{name}.{stack} has blocks without cross_attention, which would not see the encoder's "
                "output: set BlockConfig.cross_attention = @AttentionConfig() there."
            )

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """The stacks by the name of their field."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), StackConfig)
        }

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """The numbers of the layers at each place of the parameters, e.g. at `stack/scanned/0`."""
        stacks = self.stacks.items()
        return {"/".join((name, *place)): numbers for name, stack in stacks for place, numbers in stack.places.items()}

    @property
    def reads_inputs(self) -> bool:
        """Whether texts to read and texts to write are apart: an encoder-decoder."""
        return len(self.stacks) > 1

    @property
    def writes_text(self) -> bool:
        """Whether it predicts the next token."""
        return self.features == "decoder" and self.head.writes_text

    @property
    def uses_dropout(self) -> bool:
        blocks = (block for stack in self.stacks.values() for block in stack.distinct)
        return self.dropout_rate > 0 or self.head.uses_dropout or any(block.uses_dropout for block in blocks)

    def initializers(self, stack: str) -> Initializers:
        """How the projections of a stack's blocks start."""
        depth = self.stacks[stack].num_layers
        build = self.kernel_init.build
        match self.residual_init:
            case "depth_scaled":
                return Initializers(build(), build(), build(scale=1 / math.sqrt(2 * depth)))
            case "fixup":
                return Initializers(build(), build(scale=1 / math.sqrt(2 * depth)), build(scale=0.0))
            case "t_fixup":
                scale = (9 * depth) ** -0.25 if stack == "decoder" else 0.67 * depth**-0.25
                return Initializers(build(), build(scale=scale), build(scale=scale))
        return Initializers(build(), build(), build())


@configurable
class DecoderConfig(TransformerConfig):
    """A decoder-only language model (GPT, Llama, ...).

    Attributes:
      stack: the layers.
    """

    stack: StackConfig
    # The first part of the names of the arrays that the head reads.
    features = "decoder"


@configurable
class EncoderConfig(TransformerConfig):
    """A bidirectional encoder (BERT, RoBERTa, ModernBERT).

    Attributes:
      stack: the layers.
    """

    stack: StackConfig
    features = "encoder"


@configurable
class EncoderDecoderConfig(TransformerConfig):
    """An encoder, and a decoder whose blocks attend to its output too (Vaswani et al. 2017; T5).

    Both share the token embedding.

    Attributes:
      encoder: the layers that read the inputs.
      decoder: the layers that write the targets; their blocks have `cross_attention`.
    """

    encoder: StackConfig
    decoder: StackConfig
    # The first part of the names of the arrays that the head reads.
    features = "decoder"


ModelConfig = DecoderConfig | EncoderConfig | EncoderDecoderConfig


class Output(NamedTuple):
    """What a model makes of a batch.

    Attributes:
      x: vectors for the head.
      tokens: that they belong to.
      stats: of the routers, by stack.
    """

    x: Float[Array, "batch length embed"]
    tokens: TokenInfo
    stats: dict[str, Any]


class Transformer(Module):
    """What all models are made of: `embedding` [vocab, embed], what is added to it, and the head."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        assert config.vocab_size is not None, "the vocabulary's size is resolved before the model is built"
        keys = jax.random.split(key, 4)
        init = config.embedding_init.build()
        table = lambda key, rows, axis: parameter(
            init(key, (rows, config.d_model), rows, config.d_model), (axis, "embed")
        )
        self.embedding = table(keys[0], config.vocab_size, "vocab")
        self.positions = config.positions and config.positions.build(config.d_model, init=init, key=keys[1])
        self.token_types = table(keys[2], config.num_token_types, "position") if config.num_token_types else None
        self.embedding_norm = config.embedding_norm and config.embedding_norm.build(config.d_model)
        self.head = config.head.build(
            HeadSpec(
                d_model=config.d_model,
                vocab_size=config.vocab_size,
                features=config.features,
                init=config.kernel_init.build(),
                embedding_init=init,
                dtype=jnp.dtype(config.dtype),
            ),
            keys[3],
        )
        self.config = config

    def stack_of(self, name: str, key: PRNGKeyArray, *, causal: bool) -> Stack:
        config = self.config
        options = {"inits": config.initializers(name), "dtype": jnp.dtype(config.dtype)}
        return Stack(config.stacks[name], config.d_model, mask=MaskSpec(causal=causal), key=key, **options)

    def embed(
        self, tokens: TokenInfo, *, token_types: Ids | None = None, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch length embed"]:
        # Looked up from rows that are whole: rows sharded over the batch's axes would come back in the wrong layout.
        x = constrain(self.embedding[...], "vocab", None)[tokens.ids]
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        if self.positions is not None:
            x = x + self.positions(tokens.positions)
        if self.token_types is not None:
            x = x + self.token_types[...][jnp.zeros_like(tokens.ids) if token_types is None else token_types]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = dropout(x.astype(self.config.dtype), self.config.dropout_rate, dropout_key)
        return constrain(x, "batch", "length", "embed")

    def ordered(self, tokens: TokenInfo) -> TokenInfo:
        """The tokens as the layers see them."""
        return tokens

    def dropout_keys(self, dropout_key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
        """Keys for parts of the model; None without a key, or without any dropout."""
        if dropout_key is None or not self.config.uses_dropout:
            return [None] * count
        return split_keys(dropout_key, count)


class Decoder(Transformer):
    def __init__(self, config: DecoderConfig, key: PRNGKeyArray):
        key, stack_key = jax.random.split(key)
        super().__init__(config, key)
        self.stack = self.stack_of("stack", stack_key, causal=True)

    def __call__(
        self,
        tokens: TokenInfo,
        *,
        dropout_key: PRNGKeyArray | None = None,
        attend: Attend = attend_within,
        states: States | None = None,
    ) -> StackOutput:
        """Vectors behind the last layer.

        Args:
          tokens: see `token_info`.
          dropout_key: one, or one per row (a pipeline needs that); turns dropout on, where the configuration has any.
          attend: the core of attention (see `models.context.Attend`).
          states: the layers' states for `attend`.
        """
        embed_key, stack_key = self.dropout_keys(dropout_key, 2)
        x = self.embed(tokens, dropout_key=embed_key)
        return self.stack(x, Context(self.ordered(tokens), dropout_key=stack_key, attend=attend), states)

    def ordered(self, tokens: TokenInfo) -> TokenInfo:
        counts = any(mixer.needs_order for mixer in self.config.stack.mixers)
        return tokens._replace(order=tokens.positions) if counts and tokens.order is None else tokens

    def run(self, batch: Batch, dropout_key: PRNGKeyArray | None = None) -> Output:
        tokens = token_info(batch, "decoder")
        out = self(tokens, dropout_key=dropout_key)
        return Output(out.x, tokens, {"stack": out.stats})


class Encoder(Transformer):
    def __init__(self, config: EncoderConfig, key: PRNGKeyArray):
        key, stack_key = jax.random.split(key)
        super().__init__(config, key)
        self.stack = self.stack_of("stack", stack_key, causal=False)

    def __call__(
        self, tokens: TokenInfo, *, token_types: Ids | None = None, dropout_key: PRNGKeyArray | None = None
    ) -> StackOutput:
        """Vectors behind the last layer; `token_types` are ids in [0, num_token_types), None: 0 everywhere."""
        embed_key, stack_key = self.dropout_keys(dropout_key, 2)
        x = self.embed(tokens, token_types=token_types, dropout_key=embed_key)
        return self.stack(x, Context(tokens, dropout_key=stack_key))

    def run(self, batch: Batch, dropout_key: PRNGKeyArray | None = None) -> Output:
        tokens = token_info(batch, "encoder")
        out = self(tokens, token_types=batch.get("encoder_token_types"), dropout_key=dropout_key)
        return Output(out.x, tokens, {"stack": out.stats})


class EncoderDecoder(Transformer):
    def __init__(self, config: EncoderDecoderConfig, key: PRNGKeyArray):
        key, encoder_key, decoder_key = jax.random.split(key, 3)
        super().__init__(config, key)
        self.encoder = self.stack_of("encoder", encoder_key, causal=False)
        self.decoder = self.stack_of("decoder", decoder_key, causal=True)

    def encode(self, tokens: TokenInfo, *, dropout_key: PRNGKeyArray | None = None) -> StackOutput:
        """Vectors behind the encoder's last layer."""
        embed_key, stack_key = self.dropout_keys(dropout_key, 2)
        return self.encoder(self.embed(tokens, dropout_key=embed_key), Context(tokens, dropout_key=stack_key))

    def decode(
        self,
        tokens: TokenInfo,
        encoded: Encoded,
        *,
        dropout_key: PRNGKeyArray | None = None,
        attend: Attend = attend_within,
        states: States | None = None,
    ) -> StackOutput:
        """Vectors behind the decoder's last layer; the arguments are those of `Decoder`."""
        embed_key, stack_key = self.dropout_keys(dropout_key, 2)
        x = self.embed(tokens, dropout_key=embed_key)
        return self.decoder(x, Context(tokens, encoded, dropout_key=stack_key, attend=attend), states)

    def run(self, batch: Batch, dropout_key: PRNGKeyArray | None = None) -> Output:
        encoder_key, decoder_key = self.dropout_keys(dropout_key, 2)
        inputs, targets = token_info(batch, "encoder"), token_info(batch, "decoder")
        encoded = self.encode(inputs, dropout_key=encoder_key)
        decoded = self.decode(targets, Encoded(encoded.x, inputs.segment_ids), dropout_key=decoder_key)
        return Output(decoded.x, targets, {"encoder": encoded.stats, "decoder": decoded.stats})


def build_model(config: ModelConfig, key: PRNGKeyArray) -> Transformer:
    kinds = {DecoderConfig: Decoder, EncoderConfig: Encoder, EncoderDecoderConfig: EncoderDecoder}
    return kinds[type(config)](config, key)


def token_info(batch: Batch, side: Literal["encoder", "decoder"] = "decoder") -> TokenInfo:
    """The tokens of one side of a batch; without positions they are consecutive."""
    names = ("positions", "segment_ids", "order", "key_mask")
    given = {name: batch.get(f"{side}_{name}") for name in names}
    ids = batch[f"{side}_input_tokens"]
    if given["positions"] is None:
        given["positions"] = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return TokenInfo(ids=ids, **given)


import_parts("t5x_like.models.heads")
