"""Whole models: decoder (GPT), encoder (BERT) and encoder-decoder (T5), from token ids to vectors."""

import abc
import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable, import_parts, inert
from t5x_like.errors import UserError
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.kernels.randomness import split_keys
from t5x_like.models.block import BlockState
from t5x_like.models.context import Attend, Context, Encoded, TokenInfo, attend_within
from t5x_like.models.feedforward.mlp import dropout
from t5x_like.models.heads.head import Head, HeadSpec
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.norms import Norm
from t5x_like.models.parameters import InitializerConfig, Initializers, Module, parameter
from t5x_like.models.positions import Positions
from t5x_like.models.probe import show
from t5x_like.models.stack import LayerResults, Stack, StackConfig, StackOutput, States, Vectors
from t5x_like.models.token_loss import Batch
from t5x_like.sharding.logical import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """The role of a model, and what all have: its stacks are the fields that are StackConfigs, in the order they run.

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
    @abc.abstractmethod
    def features(self) -> Literal["encoder", "decoder"]:
        """The first part of the names of the arrays that the last stack and the head read."""

    def build(self, key: PRNGKeyArray) -> "Transformer":
        """The model with random parameters."""
        return Transformer(self, key)

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
    def sides(self) -> dict[str, Literal["encoder", "decoder"]]:
        """What each stack is: an encoder sees tokens behind, a decoder does not."""
        *before, last = self.stacks
        return dict.fromkeys(before, "encoder") | {last: self.features}

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

    def dropout_keys(self, dropout_key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
        """Keys for parts of the model; None without a key, or without any dropout."""
        if dropout_key is None or not self.uses_dropout:
            return [None] * count
        return split_keys(dropout_key, count)

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
class DecoderConfig(ModelConfig):
    """A decoder-only language model (GPT, Llama, ...).

    Attributes:
      stack: the layers.
    """

    stack: StackConfig
    features = "decoder"


@configurable
class EncoderConfig(ModelConfig):
    """A bidirectional encoder (BERT, RoBERTa, ModernBERT).

    Attributes:
      stack: the layers.
    """

    stack: StackConfig
    features = "encoder"


@configurable
class EncoderDecoderConfig(ModelConfig):
    """An encoder, and a decoder whose blocks attend to its output too (Vaswani et al. 2017; T5).

    Both share the token embedding.

    Attributes:
      encoder: the layers that read the inputs.
      decoder: the layers that write the targets; their blocks have `cross_attention`.
    """

    encoder: StackConfig
    decoder: StackConfig
    features = "decoder"


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
        key, *stack_keys = jax.random.split(key, 1 + len(config.stacks))
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
        for (name, stack), stack_key in zip(config.stacks.items(), stack_keys, strict=True):
            options = {"inits": config.initializers(name), "dtype": jnp.dtype(config.dtype), "key": stack_key}
            mask = MaskSpec(causal=config.sides[name] == "decoder")
            setattr(self, name, Stack(stack, config.d_model, mask=mask, **options))

    def run(self, batch: Batch, dropout_key: PRNGKeyArray | None = None) -> Output:
        """All stacks on a batch, each attending to what comes out of the one before."""
        names = list(self.config.stacks)
        keys = [dropout_key] if len(names) == 1 else self.config.dropout_keys(dropout_key, len(names))
        encoded, stats = None, {}
        for name, key in zip(names, keys, strict=True):
            tokens = token_info(batch, self.config.sides[name])
            out = self(tokens, encoded, name=name, dropout_key=key)
            encoded, stats[name] = Encoded(out.x, tokens.segment_ids), out.stats
        return Output(out.x, tokens, stats)

    def __call__(
        self,
        tokens: TokenInfo,
        encoded: Encoded | None = None,
        *,
        name: str | None = None,
        dropout_key: PRNGKeyArray | None = None,
        attend: Attend = attend_within,
        states: States | None = None,
    ) -> StackOutput:
        """One stack on tokens: vectors behind its last layer.

        Args:
          tokens: see `token_info`.
          encoded: what a decoder attends to.
          name: of the stack; None: the last.
          dropout_key: one, or one per row (a pipeline needs that); turns dropout on, where the configuration has any.
          attend: the core of attention (see `models.context.Attend`).
          states: the layers' states for `attend`.
        """
        name = name or list(self.config.stacks)[-1]
        given = {"scanned": {}, "unrolled": {}} if states is None else states
        context = self.context(name, tokens, encoded, dropout_key, attend)
        x, begun = self.begin(name, context, given["unrolled"])
        x, cycles = getattr(self, name).run_cycles(x, context, given["scanned"])
        x, ended = getattr(self, name).end(x, context, given["unrolled"])
        results = {"scanned": cycles, "unrolled": begun | ended}
        show({kind: {i: result.sizes for i, result in layers.items()} for kind, layers in results.items()})
        return StackOutput(x, results)

    def context(
        self,
        name: str,
        tokens: TokenInfo,
        encoded: Encoded | None = None,
        dropout_key: PRNGKeyArray | None = None,
        attend: Attend = attend_within,
    ) -> Context:
        """What goes down through a stack: `begin`, its cycles, and its end."""
        embed_key, stack_key = self.config.dropout_keys(dropout_key, 2)
        stack = getattr(self, name)
        if tokens.order is None and any(mixer.needs_order for mixer in stack.config.mixers):
            tokens = tokens._replace(order=tokens.positions)
        return Context(tokens, encoded, stack.bias(), stack_key, attend, embed_key)

    def begin(self, name: str, context: Context, states: dict[str, BlockState]) -> tuple[Vectors, LayerResults]:
        """The embedded tokens, through the layers before a stack's cycles."""
        return getattr(self, name).begin(self.embed(context.tokens, context.embed_key), context, states)

    def embed(self, tokens: TokenInfo, dropout_key: PRNGKeyArray | None) -> Vectors:
        # Looked up from rows that are whole: rows sharded over the batch's axes would come back in the wrong layout.
        x = constrain(self.embedding[...], "vocab", None)[tokens.ids]
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        if self.positions is not None:
            x = x + self.positions(tokens.positions)
        if self.token_types is not None:
            x = x + self.token_types[...][jnp.zeros_like(tokens.ids) if tokens.types is None else tokens.types]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = dropout(x.astype(self.config.dtype), self.config.dropout_rate, dropout_key)
        return constrain(x, "batch", "length", "embed")


def token_info(batch: Batch, side: Literal["encoder", "decoder"] = "decoder") -> TokenInfo:
    """The tokens of one side of a batch; without positions they are consecutive."""
    given = {name: batch.get(f"{side}_{name}") for name in ("positions", "segment_ids", "order", "key_mask")}
    ids = batch[f"{side}_input_tokens"]
    if given["positions"] is None:
        given["positions"] = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return TokenInfo(ids=ids, types=batch.get(f"{side}_token_types"), **given)


import_parts("t5x_like.models.heads")
