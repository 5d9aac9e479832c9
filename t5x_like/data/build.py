"""The data of a run: its configuration, and what is built from it."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

from t5x_like.configurable import configurable
from t5x_like.data.batches import OrderedBatches, RandomWindows, ShuffledBatches
from t5x_like.data.corpus import Corpus, Split, prepare_corpus
from t5x_like.data.layouts import PackedRows, Windows
from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.data.sources import TextSource
from t5x_like.data.subwords import SentencePieceConfig, SentencePieceFileConfig
from t5x_like.data.tokenizers import ByteTokenizerConfig, CharacterTokenizerConfig, Tokenizer, WordTokenizerConfig
from t5x_like.errors import UserError


@configurable
class DataConfig:
    """Text, how it is tokenised and split, and how it becomes batches.

    Attributes:
      sequence_length: Tokens per row that are predicted.
      batch_size: Rows per batch over all devices; a step trains on at most `batch_size * sequence_length` tokens.
      source: The text.
      tokenizer: Tokens; one that is trained is trained on the source, once, and kept.
      layout: `concatenate`: the token stream is cut into rows, all of which are seen once per epoch; `pack`: rows of
        whole documents that do not see each other (segment ids), padded, seen once per epoch; `random_windows`: rows
        start anywhere in the stream, without epochs (as nanoGPT). Validation is always complete and in order.
      split: What is validation: `document`: documents chosen by a hash of their content; `position`: the end of
        the text.
      validation_fraction: Share of the documents, or of the characters, that validates and never trains.
      seed: Of the order of the rows.
    """

    sequence_length: int
    batch_size: int
    source: PythonLibrarySource | TextSource = PythonLibrarySource()
    tokenizer: (
        SentencePieceConfig
        | SentencePieceFileConfig
        | ByteTokenizerConfig
        | CharacterTokenizerConfig
        | WordTokenizerConfig
    ) = SentencePieceConfig()
    layout: Literal["concatenate", "pack", "random_windows"] = "concatenate"
    split: Literal["document", "position"] = "document"
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self):
        for field, least in (("sequence_length", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise UserError(f"DataConfig.{field}={getattr(self, field)}: must be at least {least}.")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"DataConfig.validation_fraction={self.validation_fraction}: must be between 0 and 1.")

    @property
    def features(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The arrays of a batch: the shape of a row, and the dtype."""
        dtypes = {"decoder_input_tokens": "int32", "decoder_target_tokens": "int32", "decoder_loss_weights": "float32"}
        if self.layout == "pack":
            dtypes |= {"decoder_segment_ids": "int32", "decoder_positions": "int32"}
        return {name: ((self.sequence_length,), dtype) for name, dtype in dtypes.items()}


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
      config: What it was built from.
      corpus: The tokens of both splits.
      train: `batch(step, rows)`: the batches of training, without end.
      validation: `batch(number, rows)` and `num_batches`: the whole validation split, in order.
    """

    config: DataConfig
    corpus: Corpus
    train: ShuffledBatches | RandomWindows
    validation: OrderedBatches

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of validation text per validation target (end of document included)."""
        return self.corpus.validation.num_bytes / self.validation.num_targets

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what `train.batch(step)` is, for every step."""
        config = self.config
        facts = (self.corpus.fingerprint, config.layout, config.sequence_length, config.batch_size, config.seed)
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def describe(self) -> str:
        """Two lines for a log: the text by split, and what a step takes of it."""
        train, validation = self.corpus.train, self.corpus.validation
        config, num_targets = self.config, self.train.layout.num_targets
        step = config.batch_size * config.sequence_length
        return (
            f"{len(train.starts):,} documents ({train.num_bytes:,} bytes, {num_targets:,} tokens) for training, "
            f"{len(validation.starts):,} ({validation.num_bytes:,} bytes, {self.validation.num_targets:,} tokens) for "
            f"validation; vocabulary of {self.tokenizer.vocab_size:,}, {self.bytes_per_token:.2f} bytes per token\n"
            f"{config.batch_size} x {config.sequence_length} = {step:,} tokens per step ({config.layout})"
        )


def build_data(config: DataConfig, directory: Path | None) -> Data:
    """Prepares the corpus, or loads it when it is prepared already, and lays it out in batches.

    Args:
      config: The configuration.
      directory: Where the tokenizer and the tokens are kept between starts; None keeps nothing.

    Raises:
      UserError: if the text, the tokenizer or the directory cannot be used, or if a split is too short.
    """
    split = Split(config.split, config.validation_fraction)
    corpus = prepare_corpus(config.source, config.tokenizer, split, directory)
    pad = corpus.tokenizer.pad_id or 0
    layout = PackedRows if config.layout == "pack" else Windows
    train, validation = (layout(tokens, config.sequence_length, pad) for tokens in (corpus.train, corpus.validation))
    _check_sizes(config, corpus, train.num_targets, validation.num_targets)
    batches = RandomWindows if config.layout == "random_windows" else ShuffledBatches
    return Data(
        config, corpus, batches(train, config.batch_size, config.seed), OrderedBatches(validation, config.batch_size)
    )


def _check_sizes(config: DataConfig, corpus: Corpus, train_targets: int, validation_targets: int):
    if train_targets < config.sequence_length:
        raise UserError(
            f"The training text has {train_targets} tokens, less than one sequence of "
            f"DataConfig.sequence_length={config.sequence_length}: use shorter sequences, or more text."
        )
    if not validation_targets:
        num_documents = len(corpus.train.starts) + len(corpus.validation.starts)
        raise UserError(
            f"No text is left for validation: DataConfig.validation_fraction={config.validation_fraction} with "
            f"split={config.split!r} takes none of {num_documents} documents. Set DataConfig.split = 'position', "
            "which cuts documents, or a larger fraction, or TextSource.document_separator if a file holds several."
        )
