"""The data of a run: its configuration."""

from t5x_like.configurable import configurable, import_parts
from t5x_like.data.augmentation import Augmentation
from t5x_like.data.layouts import LayoutName
from t5x_like.data.objectives.causal import CausalLM
from t5x_like.data.objectives.objective import Features, Objective
from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.data.sources import Source
from t5x_like.data.splits import SplitBy
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tasks.task import Task
from t5x_like.data.tokenizers import TokenizerConfig
from t5x_like.errors import UserError


@configurable
class DataConfig:
    """Text, how it is tokenised and split, and how it becomes batches.

    Attributes:
      sequence_length: Tokens of a row that the model reads: of the encoder, where there is one.
      batch_size: Rows per batch over all devices.
      source: The text.
      tokenizer: Tokens; one that is trained is trained on the source, once, and kept. None for a source that has its
        own (PreparedSource, Mixture), and only then.
      objective: What is predicted from what.
      augmentations: Noise on what the model reads in training, one after the other.
      layout: `concatenate`: the token stream is cut into rows, all of which are seen once per epoch; `pack`: rows of
        whole documents that do not see each other (segment ids), padded, seen once per epoch; `documents`: one document
        per row, padded, seen once per epoch; `random_windows`: rows start anywhere in the stream, without epochs (as
        nanoGPT). Documents longer than a row are cut. Validation is always complete and in order.
      split: What is validation: `document`: documents chosen by a hash of their content; `position`: the end of
        the text.
      validation_fraction: Share of the documents, or of the characters, that validates and never trains.
      seed: Of the order of the rows, and of the objective's noise in training.
    """

    sequence_length: int
    batch_size: int
    source: Source = PythonLibrarySource()
    tokenizer: TokenizerConfig | None = SentencePieceConfig()
    objective: Objective = CausalLM()
    augmentations: tuple[Augmentation, ...] = ()
    layout: LayoutName = "concatenate"
    split: SplitBy = "document"
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self):
        for field, least in (("sequence_length", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise UserError(f"DataConfig.{field}={getattr(self, field)}: must be at least {least}.")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"DataConfig.validation_fraction={self.validation_fraction}: must be between 0 and 1.")
        self._check_source()
        if self.objective.takes_examples:
            self._check_examples()
        self.objective.text_length(self.sequence_length)
        if self.objective.needs_documents and self.layout != "documents":
            raise UserError(
                f"DataConfig.layout={self.layout!r} mixes documents in a row, which {self.objective} cannot use: "
                "set it to 'documents'."
            )

    def _check_source(self):
        """The source needs a tokenizer or brings one, and is of the kind that the objective takes."""
        source, objective = type(self.source).__name__, type(self.objective).__name__
        if self.source.brings_tokenizer and self.tokenizer is not None:
            raise UserError(f"DataConfig.source=@{source}() has its own tokenizer: set DataConfig.tokenizer = None.")
        if not self.source.brings_tokenizer and self.tokenizer is None:
            raise UserError(f"DataConfig.tokenizer=None: choose one for the text of @{source}().")
        takes = self.objective.takes_examples
        if takes != bool(self.tasks):
            what = "takes the examples of a task" if takes else "takes text, not the examples of a task"
            raise UserError(
                f"DataConfig.objective = @{objective}() {what}, but DataConfig.source is @{source}(): change the one "
                "or the other (see docs/tasks.md)."
            )
        if self.source.needs_epochs and self.layout == "random_windows":
            raise UserError(
                f"DataConfig.layout='random_windows' has no epochs to mix: choose another with @{source}()."
            )

    def _check_examples(self):
        """The tasks must have what the objective takes of an example, and the layout must keep examples apart."""
        objective = type(self.objective).__name__
        for task in self.tasks:
            wants = {*self.objective.field_names, *self.objective.number_names}
            if missing := wants - {*task.field_names, *task.number_names}:
                raise UserError(
                    f"DataConfig.objective = @{objective}() needs {', '.join(sorted(missing))}, which "
                    f"@{type(task).__name__}() has not got: see docs/tasks.md for what belongs together."
                )
        if self.layout != "documents" and not (self.layout == "pack" and self.objective.packable):
            other = " or 'pack'" if self.objective.packable else ""
            raise UserError(f"DataConfig.layout={self.layout!r}: @{objective}() has examples, use 'documents'{other}.")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the source is, or mixes; none if it is text."""
        return self.source.tasks

    @property
    def features(self) -> Features:
        """Shape of one row and dtype of a batch's arrays, by name; the arrays are [batch_size, *shape]."""
        return self.objective.features(self.sequence_length, packed=self.layout == "pack")


import_parts("t5x_like.data", "t5x_like.data.objectives", "t5x_like.data.tasks")
