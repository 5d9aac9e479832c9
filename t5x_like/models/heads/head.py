"""The role of a head: what becomes of a model's vectors, and the loss that it gives by default."""

import abc
import dataclasses
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from t5x_like.data.tasks.task import Task
from t5x_like.errors import UserError
from t5x_like.models.parameters import Initializer, Linear, Module
from t5x_like.models.token_loss import Batch, Term, TokenLoss

Vectors = Float[Array, "batch length embed"]
IsToken = Bool[Array, "batch length"]


@dataclasses.dataclass(frozen=True)
class HeadSpec:
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


class HeadModule(Module):
    """The layers of a head: losses of a batch, and what it predicts."""

    def terms(
        self,
        x: Vectors,
        batch: Batch,
        *,
        loss: TokenLoss,
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


class Head(abc.ABC):
    """The role of a head.

    Attributes:
      uses_dropout: whether it draws random numbers while training.
      writes_text: whether it scores the tokens of the vocabulary, so that a decoder with it writes.
      compares_rows: whether its loss takes rows of a batch together, so that they must not be parted.
      depends_on_place: whether its loss depends on where in its row a token stands, beyond the token's position.
      reads_embedding: whether the model's embedding is a matrix of its products.
    """

    uses_dropout: bool = False
    writes_text: bool = False
    compares_rows: bool = False
    depends_on_place: bool = True
    reads_embedding: bool = False

    @classmethod
    @abc.abstractmethod
    def target(cls, side: str) -> str:
        """The feature that it is scored by; `side` is `encoder` or `decoder`, whose vectors it gets."""

    @abc.abstractmethod
    def build(self, spec: HeadSpec, key: PRNGKeyArray) -> HeadModule:
        """The head's layers."""

    def weights(self, batch: Batch, side: str) -> dict[str, Float[Array, "..."]]:
        """The weights of what each term of its loss is about, by the term's name: what the term will be divided by."""
        return {"sequences": batch["label_weights"]}

    def check(self, objective: str, features: Collection[str], tasks: Sequence[Task]) -> None:  # noqa: B027
        """Refuses features and tasks that have its target, and yet do not fit.

        Args:
          objective: the name of what gives the features.
          features: of a batch.
          tasks: that the data are; none if it is text.
        """


def check_classes(config: Head, num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"{type(config).__name__}.num_classes is {num_classes}: it must be at least 2.")


def check_dropout(config: Head, rate: float) -> None:
    if not 0 <= rate < 1:
        raise UserError(f"{type(config).__name__}.dropout_rate is {rate}: it must be in [0, 1).")


def check_labels(config: Head, num_classes: int, tasks: Sequence[Task]) -> None:
    """Refuses tasks that have more or fewer classes."""
    for task in tasks:
        if num_classes != len(task.labels):
            raise UserError(
                f"{type(config).__name__}.num_classes is {num_classes}, but {type(task).__name__}.labels names "
                f"{len(task.labels)} classes: make them the same."
            )


def classification(prefix: str, scores: Float[Array, "*n classes"], labels: Array, weights: Float[Array, "*n"]) -> Term:
    """Cross-entropy of classes, and how many are right; `prefix` begins the metrics' names."""
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.where(weights > 0, labels, 0))
    objective = jnp.sum(weights * losses)
    right = jnp.sum(weights * (scores.argmax(axis=-1) == labels))
    return Term(objective, weights.sum(), {f"{prefix}loss": objective, f"{prefix}accuracy": right})
