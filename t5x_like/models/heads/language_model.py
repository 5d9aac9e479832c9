"""Scores of the tokens of the vocabulary: language models of all kinds."""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.data.tasks.task import Task
from t5x_like.errors import UserError
from t5x_like.models.feedforward.mlp import ACTIVATIONS, Activation
from t5x_like.models.heads.head import Head, HeadModule, HeadSpec, classification
from t5x_like.models.heads.pooled import Pooled
from t5x_like.models.heads.sequence_classification import SequenceClassificationHeadConfig
from t5x_like.models.norms import Norm, NormConfig
from t5x_like.models.parameters import parameter
from t5x_like.models.token_loss import Batch, Term, token_loss


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
    norm: Norm = NormConfig(kind="layernorm", use_bias=True)


@configurable
class LanguageModelHeadConfig(Head):
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

    writes_text = True
    depends_on_place = False

    def __post_init__(self):
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise UserError(f"LanguageModelHeadConfig.soft_cap is {self.soft_cap}: it must be positive, or None.")

    @classmethod
    def target(cls, side: str) -> str:
        return f"{side}_target_tokens"

    @property
    def reads_embedding(self) -> bool:
        return self.tie_embeddings

    def weights(self, batch: Batch, side: str) -> dict[str, Float[Array, "..."]]:
        weights = {"tokens": batch[f"{side}_loss_weights"]}
        return weights | {"pairs": batch["pair_weights"]} if self.classify_pairs else weights

    def build(self, spec: HeadSpec, key: PRNGKeyArray) -> HeadModule:
        return LanguageModelHead(self, spec, key)

    def check(self, objective: str, features: Collection[str], tasks: Sequence[Task]) -> None:
        has_pairs = "pair_labels" in features
        if self.classify_pairs != has_pairs:
            raise UserError(
                f"LanguageModelHeadConfig.classify_pairs is {self.classify_pairs}, but DataConfig.objective "
                f"= @{objective}() has {'' if has_pairs else 'no '}pairs to classify: change the one "
                "or the other (MaskedLM.pairs)."
            )


class LanguageModelHead(HeadModule):
    """`projection` [vocab, embed] is laid out like the embedding, so that the loss sees one layout."""

    def __init__(self, config: LanguageModelHeadConfig, spec: HeadSpec, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        shape, transform = (spec.vocab_size, spec.d_model), config.transform
        untied = lambda: parameter(spec.embedding_init(keys[0], shape, *shape[::-1]), ("vocab", "embed"))
        self.projection = None if config.tie_embeddings else untied()
        self.transform = transform and spec.linear({"head_embed": spec.d_model}, transform.use_bias, keys[1])
        self.transform_norm = transform and transform.norm.build(spec.d_model)
        self.bias = parameter(jnp.zeros(spec.vocab_size), ("vocab",)) if config.use_bias else None
        pairs = SequenceClassificationHeadConfig(num_classes=2)
        self.pairs = Pooled(pairs, 2, spec, keys[2]) if config.classify_pairs else None
        self.features, self.dtype, self.config = spec.features, spec.dtype, config

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

    def log_likelihoods(
        self, x: Float[Array, "*batch embed"], embedding: Float[Array, "vocab embed"], labels: Int[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        """The logarithm of the probability of each label, from all scores at once."""
        scores = self.scores(x, embedding)
        chosen = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(scores, axis=-1)
