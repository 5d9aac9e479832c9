"""What becomes of a model's vectors: scores of tokens, classes, spans or sequences, and their losses."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.models.feedforward.mlp import ACTIVATIONS, Activation, dropout
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import Initializer, Linear, Module, parameter
from t5x_like.models.token_loss import Batch, LossConfig, Term, token_loss

Vectors = Float[Array, "batch length embed"]
IsToken = Bool[Array, "batch length"]


@configurable
class HeadTransformConfig:
    """A layer between the model and the scores of tokens (BERT, RoBERTa, ModernBERT): norm(activation(W x)).

    Attributes:
      activation: as MLPConfig.activation.
      use_bias: a bias on the projection.
      norm: normalisation of the result.
    """

    activation: Activation = "gelu"
    use_bias: bool = True
    norm: NormConfig = NormConfig(kind="layernorm", use_bias=True)


@configurable
class LanguageModelHeadConfig:
    """Scores of all tokens of the vocabulary, at every token: of causal, masked and encoder-decoder models.

    Attributes:
      tie_embeddings: the output projection is the embedding's transpose.
      transform: a layer before it; None: none.
      use_bias: a bias per token of the vocabulary.
      scale_by_width: multiplies the vectors by d_model ** -0.5 (T5 1.0, whose embeddings are tied).
      soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2); None: they stay.
      classify_pairs: also predicts, from the first token, the label of the pair of sentences in a row: whether the
        second follows the first (next sentence prediction, Devlin et al. 2019), or their order (ALBERT).
    """

    tie_embeddings: bool = True
    transform: HeadTransformConfig | None = None
    use_bias: bool = False
    scale_by_width: bool = False
    soft_cap: float | None = None
    classify_pairs: bool = False

    def __post_init__(self):
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise UserError(f"LanguageModelHeadConfig.soft_cap is {self.soft_cap}: it must be positive, or None.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledHeadConfig:
    """One vector per sequence, and numbers made of it.

    Attributes:
      pool: the token whose vector stands for the sequence: the `first` (BERT), the `last` (GPT), or the `mean` of all.
      hidden_activation: activation of a layer [d_model, d_model] before the last one (BERT's pooler: `tanh`); None: no
        such layer.
      use_bias: biases.
      dropout_rate: dropout before the last layer while training.
    """

    pool: Literal["first", "last", "mean"] = "first"
    hidden_activation: Activation | None = "tanh"
    use_bias: bool = True
    dropout_rate: float = 0.0

    def __post_init__(self):
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"{type(self).__name__}.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")


@configurable
class SequenceClassificationHeadConfig(PooledHeadConfig):
    """A class for each sequence: `labels` and `label_weights` [batch].

    Attributes:
      num_classes: number of classes.
    """

    num_classes: int

    def __post_init__(self):
        super().__post_init__()
        check_classes(self)


@configurable
class RegressionHeadConfig(PooledHeadConfig):
    """A number for each sequence, by mean squared error: `targets` and `label_weights` [batch]."""


@configurable
class RewardHeadConfig(PooledHeadConfig):
    """A score for each sequence, by which of two is preferred (Bradley & Terry 1952; Ouyang et al. 2022, section 3.5).

    Rows come in pairs: the preferred one, then the other. `label_weights` [batch] of the first of each pair count.
    """


@configurable
class TokenClassificationHeadConfig:
    """A class for each token: the batch's target tokens are classes.

    Attributes:
      num_classes: number of classes.
      use_bias: a bias per class.
      dropout_rate: dropout before the projection while training.
    """

    num_classes: int
    use_bias: bool = True
    dropout_rate: float = 0.0

    def __post_init__(self):
        check_classes(self)
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"TokenClassificationHeadConfig.dropout_rate is {self.dropout_rate}: it must be in [0, 1).")


@configurable
class SpanHeadConfig:
    """The first and the last token of an answer in a text (SQuAD).

    The batch has `span_starts`, `span_ends` and `label_weights` [batch].

    Attributes:
      use_bias: biases.
    """

    use_bias: bool = True


def check_classes(config: SequenceClassificationHeadConfig | TokenClassificationHeadConfig) -> None:
    if config.num_classes < 2:
        raise UserError(f"{type(config).__name__}.num_classes is {config.num_classes}: it must be at least 2.")


HeadConfig = (
    LanguageModelHeadConfig
    | SequenceClassificationHeadConfig
    | RegressionHeadConfig
    | RewardHeadConfig
    | TokenClassificationHeadConfig
    | SpanHeadConfig
)


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """What every head is built from.

    Attributes:
      d_model: size of the vectors.
      vocab_size: of the embedding.
      features: `encoder` or `decoder`: the first part of the names of the arrays that belong to the vectors' tokens.
      init: how projections start.
      embedding_init: how an output projection to the vocabulary starts.
      dtype: of activations.
    """

    d_model: int
    vocab_size: int
    features: str
    init: Initializer
    embedding_init: Initializer
    dtype: jnp.dtype

    def linear(self, out_dims: dict[str, int], use_bias: bool, key: PRNGKeyArray) -> Linear:
        embed = {"embed": self.d_model}
        return Linear(embed, out_dims, init=self.init, use_bias=use_bias, dtype=self.dtype, key=key)


class Head(Module):
    """Losses of a batch; `weights` says, from the batch alone, what each of them will be divided by."""

    def weights(self, batch: Batch) -> dict[str, Float[Array, "..."]]:
        """The weights of what each term is about, by the term's name."""
        return {"sequences": batch["label_weights"]}

    def terms(
        self,
        x: Vectors,
        batch: Batch,
        *,
        loss: LossConfig,
        embedding: Float[Array, "vocab embed"],
        is_token: IsToken | None,
        dropout_key: PRNGKeyArray | None,
    ) -> dict[str, Term]:
        """The terms of the loss by name.

        Args:
          x: behind the last layer.
          batch: with the labels.
          loss: of tokens of the vocabulary.
          embedding: of the model, for heads that are tied to it.
          is_token: False for padding; None: there is none.
          dropout_key: turns dropout on.
        """
        raise NotImplementedError

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch ..."]:
        """What the head says of each sequence: scores of classes [classes], a number, scores of spans [length, 2]."""
        raise NotImplementedError


class LanguageModelHead(Head):
    """`projection` [vocab, embed] is laid out like the embedding, so that the loss sees one layout."""

    def __init__(self, config: LanguageModelHeadConfig, options: HeadOptions, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        shape, transform = (options.vocab_size, options.d_model), config.transform
        untied = lambda: parameter(options.embedding_init(keys[0], shape, *shape[::-1]), ("vocab", "embed"))
        self.projection = None if config.tie_embeddings else untied()
        self.transform = transform and options.linear({"head_embed": options.d_model}, transform.use_bias, keys[1])
        self.transform_norm = transform and Norm(transform.norm, options.d_model)
        self.bias = parameter(jnp.zeros(options.vocab_size), ("vocab",)) if config.use_bias else None
        pairs = SequenceClassificationHeadConfig(num_classes=2)
        self.pairs = Pooled(pairs, 2, options, keys[2]) if config.classify_pairs else None
        self.features, self.dtype, self.config = options.features, options.dtype, config

    def weights(self, batch: Batch) -> dict[str, Float[Array, "..."]]:
        weights = {"tokens": batch[f"{self.features}_loss_weights"]}
        return weights if self.pairs is None else weights | {"pairs": batch["pair_weights"]}

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        labels, weights = (batch[f"{self.features}_{name}"] for name in ("target_tokens", "loss_weights"))
        hidden, projection = self.inputs(x), self.output_embedding(embedding)
        if self.bias is not None:
            # As one more dim of both, so that the loss sees a product and nothing else.
            hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
            projection = jnp.concatenate([projection, self.bias[...][:, None]], axis=-1)
        sums = token_loss(loss, hidden, projection, labels, weights, soft_cap=self.config.soft_cap)
        metrics = {"loss": sums.loss, "z_loss": sums.z_loss, "accuracy": sums.correct}
        terms = {"tokens": Term(sums.objective, sums.weight, metrics)}
        if self.pairs is not None:
            scores = self.pairs(x, is_token, dropout_key)
            terms["pairs"] = classification("pair_", scores, batch["pair_labels"], batch["pair_weights"])
        return terms

    def inputs(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """The vectors whose products with the rows of the output projection are the scores."""
        if self.transform is not None:
            x = self.transform_norm(ACTIVATIONS[self.config.transform.activation](self.transform(x)))
        return x * x.shape[-1] ** -0.5 if self.config.scale_by_width else x

    def output_embedding(self, embedding: Float[Array, "vocab embed"]) -> Float[Array, "vocab embed"]:
        return embedding if self.projection is None else self.projection[...]

    def scores(
        self, x: Float[Array, "*batch embed"], embedding: Float[Array, "vocab embed"]
    ) -> Float[Array, "*batch vocab"]:
        """Scores of all tokens, in float32; the loss takes them in chunks instead."""
        projection = self.output_embedding(embedding).astype(self.dtype)
        scores = jnp.einsum("...d,vd->...v", self.inputs(x), projection, preferred_element_type=jnp.float32)
        scores = scores if self.bias is None else scores + self.bias[...]
        cap = self.config.soft_cap
        return scores if cap is None else cap * jnp.tanh(scores / cap)


class Pooled(Module):
    """From the vectors of a sequence to `num_outputs` numbers."""

    def __init__(self, config: PooledHeadConfig, num_outputs: int, options: HeadOptions, key: PRNGKeyArray):
        keys = jax.random.split(key)
        hidden = config.hidden_activation
        self.hidden = hidden and options.linear({"head_embed": options.d_model}, config.use_bias, keys[0])
        self.out = options.linear({"classes": num_outputs}, config.use_bias, keys[1])
        self.config = config

    def __call__(
        self, x: Vectors, is_token: IsToken | None, dropout_key: PRNGKeyArray | None
    ) -> Float[Array, "batch classes"]:
        y = self.pool(x, is_token)
        if self.hidden is not None:
            y = ACTIVATIONS[self.config.hidden_activation](self.hidden(y))
        return self.out(dropout(y, self.config.dropout_rate, dropout_key)).astype(jnp.float32)

    def pool(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch embed"]:
        if self.config.pool == "first":
            return x[:, 0]
        is_token = jnp.ones(x.shape[:2], bool) if is_token is None else is_token
        if self.config.pool == "mean":
            count = jnp.maximum(is_token.sum(axis=1, keepdims=True), 1)
            return (jnp.where(is_token[..., None], x.astype(jnp.float32), 0).sum(axis=1) / count).astype(x.dtype)
        last = jnp.max(jnp.where(is_token, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


class SequenceClassificationHead(Head):
    def __init__(self, config: SequenceClassificationHeadConfig, options: HeadOptions, key: PRNGKeyArray):
        self.pooled = Pooled(config, config.num_classes, options, key)

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.pooled(x, is_token, dropout_key)
        return {"sequences": classification("", scores, batch["labels"], batch["label_weights"])}

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch classes"]:
        return self.pooled(x, is_token, None)


class RegressionHead(Head):
    def __init__(self, config: RegressionHeadConfig, options: HeadOptions, key: PRNGKeyArray):
        self.pooled = Pooled(config, 1, options, key)

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        predicted, weights = self.pooled(x, is_token, dropout_key)[:, 0], batch["label_weights"]
        error = jnp.sum(weights * jnp.square(predicted - batch["targets"]))
        return {"sequences": Term(error, weights.sum(), {"loss": error})}

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch"]:
        return self.pooled(x, is_token, None)[:, 0]


class RewardHead(Head):
    def __init__(self, config: RewardHeadConfig, options: HeadOptions, key: PRNGKeyArray):
        self.pooled = Pooled(config, 1, options, key)

    def weights(self, batch: Batch) -> dict[str, Float[Array, "..."]]:
        return {"sequences": batch["label_weights"][::2]}

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.pooled(x, is_token, dropout_key)[:, 0]
        margin, weights = scores[::2] - scores[1::2], self.weights(batch)["sequences"]
        objective = -jnp.sum(weights * jax.nn.log_sigmoid(margin))
        metrics = {"loss": objective, "accuracy": jnp.sum(weights * (margin > 0))}
        return {"sequences": Term(objective, weights.sum(), metrics)}


class TokenClassificationHead(Head):
    def __init__(self, config: TokenClassificationHeadConfig, options: HeadOptions, key: PRNGKeyArray):
        self.out = options.linear({"classes": config.num_classes}, config.use_bias, key)
        self.features, self.dropout_rate = options.features, config.dropout_rate

    def weights(self, batch: Batch) -> dict[str, Float[Array, "..."]]:
        return {"tokens": batch[f"{self.features}_loss_weights"]}

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.out(dropout(x, self.dropout_rate, dropout_key)).astype(jnp.float32)
        labels, weights = (batch[f"{self.features}_{name}"] for name in ("target_tokens", "loss_weights"))
        return {"tokens": classification("", scores, labels, weights)}


class SpanHead(Head):
    def __init__(self, config: SpanHeadConfig, options: HeadOptions, key: PRNGKeyArray):
        self.out = options.linear({"classes": 2}, config.use_bias, key)

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.predict(x, is_token)
        starts, ends, weights = batch["span_starts"], batch["span_ends"], batch["label_weights"]
        start, end = (classification("", scores[..., i], labels, weights) for i, labels in enumerate((starts, ends)))
        exact = (scores[..., 0].argmax(axis=-1) == starts) & (scores[..., 1].argmax(axis=-1) == ends)
        objective = (start.objective + end.objective) / 2
        metrics = {"loss": objective, "accuracy": jnp.sum(weights * exact)}
        return {"sequences": Term(objective, start.weight, metrics)}

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch length 2"]:
        scores = self.out(x).astype(jnp.float32)
        return scores if is_token is None else jnp.where(is_token[..., None], scores, -1e9)


def classification(prefix: str, scores: Float[Array, "*n classes"], labels: Array, weights: Float[Array, "*n"]) -> Term:
    """Cross-entropy of classes, and how many are right; `prefix` begins the metrics' names."""
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.where(weights > 0, labels, 0))
    objective = jnp.sum(weights * losses)
    right = jnp.sum(weights * (scores.argmax(axis=-1) == labels))
    return Term(objective, weights.sum(), {f"{prefix}loss": objective, f"{prefix}accuracy": right})


HEADS: dict[type, type[Head]] = {
    LanguageModelHeadConfig: LanguageModelHead,
    SequenceClassificationHeadConfig: SequenceClassificationHead,
    RegressionHeadConfig: RegressionHead,
    RewardHeadConfig: RewardHead,
    TokenClassificationHeadConfig: TokenClassificationHead,
    SpanHeadConfig: SpanHead,
}
