"""The data of a run: its configuration, and what is built from it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.augmentation import AnyAugmentation, augmented
from t5x_like.data.batches import OrderedBatches, RandomWindows, ShuffledBatches
from t5x_like.data.corpus import Corpus, Split, Tokens, keep_tokenizer, prepare_corpus
from t5x_like.data.layouts import AllWindows, DocumentRows, Layout, PackedRows, Windows
from t5x_like.data.mixtures import MixedBatches, Mixture, OrderedMixture
from t5x_like.data.objectives.answer_spans import SpanExtraction
from t5x_like.data.objectives.causal import CausalLM, PrefixLM
from t5x_like.data.objectives.corruption import UL2, SpanCorruption
from t5x_like.data.objectives.denoising import Denoising
from t5x_like.data.objectives.examples import AnswerLM, Classification, ExampleObjective, Regression, TextToText
from t5x_like.data.objectives.masked import MaskedLM
from t5x_like.data.objectives.objective import Features
from t5x_like.data.objectives.permutation import PermutationLM
from t5x_like.data.prepared import AnyTokenizerConfig, PreparedSource
from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.data.sources import TextSource
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tasks.any_task import AnyTask
from t5x_like.data.tasks.examples import ExampleCorpus, ExampleSet, prepare_examples
from t5x_like.data.tasks.task import Task
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError
from t5x_like.files import fingerprint


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
    source: PythonLibrarySource | TextSource | PreparedSource | Mixture | AnyTask = PythonLibrarySource()
    tokenizer: AnyTokenizerConfig | None = SentencePieceConfig()
    objective: (
        CausalLM
        | PrefixLM
        | MaskedLM
        | SpanCorruption
        | UL2
        | PermutationLM
        | Denoising
        | TextToText
        | AnswerLM
        | Classification
        | Regression
        | SpanExtraction
    ) = CausalLM()
    augmentations: tuple[AnyAugmentation, ...] = ()
    layout: Literal["concatenate", "pack", "documents", "random_windows"] = "concatenate"
    split: Literal["document", "position"] = "document"
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self):
        for field, least in (("sequence_length", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise UserError(f"DataConfig.{field}={getattr(self, field)}: must be at least {least}.")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"DataConfig.validation_fraction={self.validation_fraction}: must be between 0 and 1.")
        source = type(self.source).__name__
        is_prepared = isinstance(self.source, PreparedSource | Mixture) and not self.tasks
        if is_prepared and self.tokenizer is not None:
            raise UserError(f"DataConfig.source=@{source}() has its own tokenizer: set DataConfig.tokenizer = None.")
        if not is_prepared and self.tokenizer is None:
            raise UserError(f"DataConfig.tokenizer=None: choose one for the text of @{source}().")
        self._check_tasks()

        if isinstance(self.source, Mixture) and self.layout == "random_windows":
            raise UserError("DataConfig.layout='random_windows' has no epochs to mix: choose another with @Mixture().")
        self.objective.text_length(self.sequence_length)
        if self.objective.needs_documents and self.layout != "documents":
            raise UserError(
                f"DataConfig.layout={self.layout!r} mixes documents in a row, which {self.objective} cannot use: "
                "set it to 'documents'."
            )

    def _check_tasks(self):
        """Tasks need an objective that takes their examples, and a layout that keeps these apart."""
        objective, takes = type(self.objective).__name__, isinstance(self.objective, ExampleObjective)
        if takes != bool(self.tasks):
            what = "takes the examples of a task" if takes else "takes text, not the examples of a task"
            raise UserError(
                f"DataConfig.objective = @{objective}() {what}, but DataConfig.source is "
                f"@{type(self.source).__name__}(): change the one or the other (see docs/tasks.md)."
            )
        if not takes:
            return
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
        sources = self.source.sources if isinstance(self.source, Mixture) else (self.source,)
        return tuple(source for source in sources if isinstance(source, Task))

    @property
    def features(self) -> Features:
        """Shape of one row and dtype of a batch's arrays, by name; the arrays are [batch_size, *shape]."""
        return self.objective.features(self.sequence_length, packed=self.layout == "pack")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
      config: What it was built from.
      corpora: The tokens of both splits, of each source.
      train: `batch(step, rows)`: the batches of training, without end.
      validation: `batch(number, rows)` and `num_batches`: the whole validation split, in order.
    """

    config: DataConfig
    corpora: tuple[Corpus, ...] | tuple[ExampleCorpus, ...]
    train: ShuffledBatches | RandomWindows | MixedBatches
    validation: OrderedBatches | OrderedMixture

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpora[0].tokenizer

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of validation text per token (the end of a document being one)."""
        num_bytes = sum(corpus.validation.num_bytes for corpus in self.corpora)
        return num_bytes / self.validation.layout.num_tokens

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what `train.batch(step)` is, for every step."""
        config = self.config
        facts = (*(corpus.fingerprint for corpus in self.corpora), config.objective, config.layout)
        facts += (config.sequence_length, config.batch_size, config.seed)
        facts += (config.augmentations,) if config.augmentations else ()
        if isinstance(config.source, Mixture):
            # Directories may be renamed; what is in them is in the corpora's own fingerprints.
            mixture = config.source
            facts += (mixture.rates, mixture.temperature, mixture.max_tokens, mixture.later)
        return fingerprint(repr(facts))

    def describe(self) -> str:
        """Some lines for a log: the text by split, the sources of a mixture, and what a step takes of it all."""
        sizes = []
        for name, layout in (("train", self.train.layout), ("validation", self.validation.layout)):
            splits = [getattr(corpus, name) for corpus in self.corpora]
            num_documents, num_bytes = sum(s.num_documents for s in splits), sum(s.num_bytes for s in splits)
            sizes.append((num_documents, num_bytes, layout.num_tokens))
        (documents, size, tokens), validation = sizes
        lines = [
            f"{documents:,} documents ({size:,} bytes, {tokens:,} tokens) for training, "
            f"{validation[0]:,} ({validation[1]:,} bytes, {validation[2]:,} tokens) for validation; "
            f"vocabulary of {self.tokenizer.vocab_size:,}, {self.bytes_per_token:.2f} bytes per token",
        ]
        if isinstance(self.train, MixedBatches):
            rates = zip(self.config.source.names, self.train.schedule.rates, strict=True)
            lines.append("mixture: " + ", ".join(f"{name} {rate:.2%}" for name, rate in rates))
        if num_cut := getattr(self.train.layout, "num_cut", 0):
            lines.append(
                f"{num_cut / documents:.1%} of the examples are longer than a row and lose some of their tokens"
            )
        return "\n".join([*lines, self._describe_step()])

    def _describe_step(self) -> str:
        config, batch = self.config, self.train.batch(0)
        lengths = {name: values.shape[1] for name, values in batch.items() if name.endswith("_input_tokens")}
        shapes = [f"{config.batch_size} x {length} {name.split('_')[0]}" for name, length in lengths.items()]
        text = self.train.layout.tokens_per_row * config.batch_size
        predicted = sum(np.count_nonzero(values) for name, values in batch.items() if name.endswith("_loss_weights"))
        return (
            f"{' + '.join(shapes)} = {config.batch_size * sum(lengths.values()):,} tokens per step: "
            f"{text:,.0f} of text, about {predicted:,} predicted ({type(config.objective).__name__}, {config.layout})"
        )


def build_data(config: DataConfig, directory: Path | None) -> Data:
    """Prepares the corpus, or loads it when it is prepared already, and lays it out in batches.

    Args:
      config: The configuration.
      directory: Where the tokenizer and the tokens are kept between starts; None keeps nothing.

    Raises:
      UserError: if the text, the tokenizer or the directory cannot be used, if a split is too short, or if the
        tokenizer lacks tokens that the objective needs.
    """
    corpora = _corpora(config, directory)
    train = [lay_out(config, corpus.train) for corpus in corpora]
    # Of tasks every answer to a row is that to one example.
    alone = dataclasses.replace(config, layout="documents") if config.tasks else config
    validation = [lay_out(alone, corpus.validation) for corpus in corpora]
    _check_sizes(config, corpora, train, validation)
    transform = config.objective.build(corpora[0].tokenizer, config.sequence_length, packed=config.layout == "pack")
    size, seed = config.batch_size, config.seed
    ordered = OrderedBatches(validation[0], transform, size)
    noise = [augmentation.build(corpora[0].tokenizer, config.features) for augmentation in config.augmentations]
    clean, transform = transform, augmented(transform, noise) if noise else transform
    if isinstance(config.source, Mixture):
        stages = config.source.stages([layout.num_tokens for layout in train])
        batches = MixedBatches(train, transform, size, seed, stages)
        ordered = OrderedMixture(validation, clean, size)
    elif config.layout == "random_windows":
        windows = AllWindows(corpora[0].train, config.objective.text_length(config.sequence_length))
        batches = RandomWindows(windows, transform, size, seed)
    else:
        batches = ShuffledBatches(train[0], transform, size, seed)
    return Data(config, corpora, batches, ordered)


def _corpora(config: DataConfig, directory: Path | None) -> tuple[Corpus, ...]:
    split = Split(config.split, config.validation_fraction)
    if config.tasks:
        return _tasks(config, split, directory)
    if config.tokenizer is not None:
        return (prepare_corpus(config.source, config.tokenizer, split, directory),)
    sources = config.source.sources if isinstance(config.source, Mixture) else (config.source,)
    corpora = tuple(source.corpus(split) for source in sources)
    tokenizers = {c.tokenizer.fingerprint(): source.directory for c, source in zip(corpora, sources, strict=True)}
    if len(tokenizers) > 1:
        raise UserError(
            f"Mixture.sources have different tokenizers: {' and '.join(tokenizers.values())}. Prepare them with the "
            "same one (PrepareConfig.tokenizer = @PreparedTokenizerConfig()), and give them the same special_tokens."
        )
    if directory is not None:
        # A trained model can be used where its corpus is not.
        keep_tokenizer(directory, corpora[0].tokenizer)
    return corpora


def _tasks(config: DataConfig, split: Split, directory: Path | None) -> tuple[ExampleCorpus, ...]:
    corpora = tuple(prepare_examples(task, config.tokenizer, split, directory) for task in config.tasks)
    if len({corpus.tokenizer.fingerprint() for corpus in corpora}) > 1:
        raise UserError(
            f"Mixture.sources: @{type(config.tokenizer).__name__}() is trained on each task and becomes another: use "
            "one that exists (a file, or that of a prepared corpus or of another run)."
        )
    return corpora


def lay_out(config: DataConfig, tokens: Tokens | ExampleSet) -> Layout:
    """Rows that hold every token once."""
    objective, length = config.objective, config.sequence_length
    if isinstance(objective, ExampleObjective):
        return objective.lay_out(tokens, length, packed=config.layout == "pack")
    text_length = objective.text_length(length)
    match config.layout:
        case "pack":
            return PackedRows(tokens, text_length, lambda lengths: objective.costs(lengths, length), length)
        case "documents":
            return DocumentRows(tokens, text_length)
    return Windows(tokens, text_length)


def _check_sizes(config: DataConfig, corpora: Sequence[Corpus], train: Sequence[Layout], validation: Sequence[Layout]):
    if config.tasks:
        return  # Splits without examples are refused where they are made.
    for layout in train:
        if layout.num_tokens < config.objective.text_length(config.sequence_length):
            raise UserError(
                f"The training text has {layout.num_tokens} tokens, less than one sequence of "
                f"DataConfig.sequence_length={config.sequence_length}: use shorter sequences, or more text."
            )
    if not any(layout.num_tokens for layout in validation):
        num_documents = sum(len(corpus.train.starts) + len(corpus.validation.starts) for corpus in corpora)
        raise UserError(
            f"No text is left for validation: DataConfig.validation_fraction={config.validation_fraction} with "
            f"split={config.split!r} takes none of {num_documents} documents. Set DataConfig.split = 'position', "
            "which cuts documents, or a larger fraction, or TextSource.document_separator if a file holds several."
        )
    for name, layouts in (("training", train), ("validation", validation)):
        if config.objective.needs_other_documents and any(layout.num_documents < 2 for layout in layouts):
            raise UserError(
                f"{config.objective} takes texts of other documents, but {name} has only one: set "
                "TextSource.document_separator if a file holds several, or a larger DataConfig.validation_fraction."
            )
