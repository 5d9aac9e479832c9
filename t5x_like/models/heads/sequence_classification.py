"""A class for each sequence (BERT, section 4.1)."""

from collections.abc import Collection, Sequence

from jaxtyping import Array, Float, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.data.tasks.task import Task
from t5x_like.models.heads.head import (
    HeadModule,
    HeadSpec,
    IsToken,
    Vectors,
    check_classes,
    check_labels,
    classification,
)
from t5x_like.models.heads.pooled import Pooled, PooledHeadConfig
from t5x_like.models.token_loss import Term


@configurable
class SequenceClassificationHeadConfig(PooledHeadConfig):
    """A class for each sequence: `labels` and `label_weights` [batch].

    Attributes:
      num_classes: number of classes.
    """

    num_classes: int

    def __post_init__(self):
        super().__post_init__()
        check_classes(self, self.num_classes)

    @classmethod
    def target(cls, side: str) -> str:
        return "labels"

    def build(self, spec: HeadSpec, key: PRNGKeyArray) -> HeadModule:
        return SequenceClassificationHead(self, spec, key)

    def check(self, objective: str, features: Collection[str], tasks: Sequence[Task]) -> None:
        check_labels(self, self.num_classes, tasks)


class SequenceClassificationHead(HeadModule):
    def __init__(self, config: SequenceClassificationHeadConfig, spec: HeadSpec, key: PRNGKeyArray):
        self.pooled = Pooled(config, config.num_classes, spec, key)

    def terms(self, x, batch, *, loss, embedding, is_token, dropout_key) -> dict[str, Term]:
        scores = self.pooled(x, is_token, dropout_key)
        return {"sequences": classification("", scores, batch["labels"], batch["label_weights"])}

    def predict(self, x: Vectors, is_token: IsToken | None) -> Float[Array, "batch classes"]:
        return self.pooled(x, is_token, None)
