"""Two answers to a prompt, of which people prefer one (Ouyang et al. 2022, section 3.5)."""

import numpy as np
from jaxtyping import Float

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout
from t5x_like.data.tasks.records import Record, Records
from t5x_like.data.tasks.task import Example, Metric, Task
from t5x_like.data.tasks.templates import check_template, fill
from t5x_like.data.tokenizers import Tokenizer


@configurable
class PreferenceTask(Task):
    """A prompt, the answer that is preferred, and another.

    Attributes:
      records: The records.
      prompt: Template of the prompt.
      chosen: Template of the preferred answer.
      rejected: Template of the other.
      metrics: `accuracy`: how often the model scores the preferred answer higher.
    """

    records: Records
    prompt: str = "{prompt}"
    chosen: str = "{chosen}"
    rejected: str = "{rejected}"
    metrics: tuple[Metric, ...] = ("accuracy",)

    writes = False
    field_names = ("prompt", "chosen", "rejected")

    def __post_init__(self):
        for name in self.field_names:
            check_template(f"PreferenceTask.{name}", getattr(self, name))

    def texts(self, record: Record) -> list[str]:
        return [fill(template, record) for template in (self.prompt, self.chosen, self.rejected)]

    def encode(self, record: Record, tokenizer: Tokenizer) -> Example:
        fields = dict(zip(self.field_names, tokenizer.encode_batch(self.texts(record)), strict=True))
        return Example(fields, {}, 1)

    def predicted(self, outputs: Float[np.ndarray, "rows"], layout: Layout, tokenizer: Tokenizer) -> list[int]:
        """1 where the first of two rows, the preferred answer, scores higher."""
        return (outputs[::2] > outputs[1::2]).astype(int).tolist()
