"""The data of a run, built from its configuration."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t5x_like.data.augmentation import augmented
from t5x_like.data.batches import OrderedBatches, RandomWindows, TrainBatches
from t5x_like.data.config import DataConfig
from t5x_like.data.corpus import Corpus, keep_tokenizer
from t5x_like.data.layouts import AllWindows, Layout
from t5x_like.data.splits import Split
from t5x_like.data.tasks.examples import ExampleCorpus
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError
from t5x_like.files import fingerprint


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
    train: TrainBatches
    validation: OrderedBatches

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
        facts += config.source.facts
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
        lines += self.train.describe()
        if num_cut := self.train.layout.num_cut:
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
    objective, source, length = config.objective, config.source, config.sequence_length
    corpora = source.corpora(Split(config.split, config.validation_fraction), config.tokenizer, directory)
    tokenizer = corpora[0].tokenizer
    if source.brings_tokenizer and directory is not None:
        # A trained model can be used where its corpus is not.
        keep_tokenizer(directory, tokenizer)
    train = [objective.lay_out(corpus.train, length, config.layout) for corpus in corpora]
    # Of tasks every answer to a row is that to one example.
    apart = "documents" if config.tasks else config.layout
    validation = [objective.lay_out(corpus.validation, length, apart) for corpus in corpora]
    _check_sizes(config, corpora, train, validation)
    clean = objective.build(tokenizer, length, packed=config.layout == "pack")
    noise = [augmentation.build(tokenizer, config.features) for augmentation in config.augmentations]
    transform = augmented(clean, noise) if noise else clean
    if config.layout == "random_windows":
        windows = AllWindows(corpora[0].train, objective.text_length(length))
        batches = RandomWindows(windows, transform, config.batch_size, config.seed)
    else:
        batches = source.training(train, transform, config.batch_size, config.seed)
    return Data(config, corpora, batches, source.validation(validation, clean, config.batch_size))


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
