"""Corpora that `t5x_like prepare` made, as sources of training and of tokenizers."""

from pathlib import Path

import numpy as np
from absl import logging

from t5x_like.configurable import configurable
from t5x_like.data.corpus import RECORD, Corpus
from t5x_like.data.shards import TOKENIZER, Shards, read_prepared
from t5x_like.data.sources import Source
from t5x_like.data.splits import Split
from t5x_like.data.tokenizers import (
    Documents,
    ExistingTokenizerConfig,
    SpecialTokens,
    Tokenizer,
    TokenizerConfig,
    read_tokenizer,
)
from t5x_like.errors import UserError
from t5x_like.files import fingerprint


@configurable
class PreparedSource(Source):
    """A corpus in shards, with its own tokenizer: what `t5x_like prepare --to=DIRECTORY` made.

    Attributes:
      directory: Of the corpus.
      max_bad_shards: Shards that may be missing or cut off; they are left out, which makes it another corpus.
      special_tokens: Ids behind those of its vocabulary, for objectives that need them.
    """

    directory: str
    max_bad_shards: int = 0
    special_tokens: SpecialTokens = SpecialTokens()

    brings_tokenizer = True

    @property
    def name(self) -> str:
        return Path(self.directory).name

    @property
    def place(self) -> str:
        return self.directory

    def corpora(self, split: Split, tokenizer: TokenizerConfig | None, directory: Path | None) -> tuple[Corpus, ...]:
        return (self.corpus(split),)

    def corpus(self, split: Split) -> Corpus:
        """Both splits, whose tokens stay in their files.

        Raises:
          UserError: if the directory holds no complete corpus, or if documents are not split by their hashes.
        """
        if split.by != "document":
            raise UserError(
                f"DataConfig.split={split.by!r}: the documents of a prepared corpus are split by their hashes alone, "
                "set it to 'document'."
            )
        directory = Path(self.directory).expanduser()
        tokenizer = prepared_tokenizer(directory)
        shards = Shards(directory, tokenizer, max_bad_shards=self.max_bad_shards)
        for name, why in shards.bad.items():
            logging.warning("%s: left out, %s.", directory / name, why)
        validates = shards.index["hash"] < np.uint64(int(split.validation_fraction * 2**64))
        facts = repr((shards.fingerprint, split))
        return Corpus(
            tokenizer=self.special_tokens.extend(tokenizer),
            train=shards.tokens(~validates),
            validation=shards.tokens(validates),
            fingerprint=fingerprint(facts),
        )


@configurable
class PreparedTokenizerConfig(ExistingTokenizerConfig):
    """The tokenizer of a corpus that is prepared already, so that another can be mixed with it.

    Attributes:
      directory: Of that corpus.
      special_tokens: Ids behind those of its vocabulary.
    """

    directory: str
    special_tokens: SpecialTokens = SpecialTokens()

    def cache_key(self) -> str:
        return repr((self.special_tokens, self.build_plain(None).fingerprint()))

    def build_plain(self, documents: Documents | None) -> Tokenizer:
        return prepared_tokenizer(Path(self.directory).expanduser())


def prepared_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a prepared corpus; UserError if there is none."""
    read_prepared(directory)
    try:
        return read_tokenizer(directory / TOKENIZER)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory / TOKENIZER} cannot be read ({error!r}): bring the tokenizer back.") from error


@configurable
class RunTokenizerConfig(ExistingTokenizerConfig):
    """The tokenizer of another run, to go on from its parameters.

    Attributes:
      model_dir: MODEL_DIR of that run.
      special_tokens: Ids behind those of its vocabulary, for the tokens that it has not got itself.
    """

    model_dir: str
    special_tokens: SpecialTokens = SpecialTokens()

    def cache_key(self) -> str:
        return repr((self.special_tokens, self.build_plain(None).fingerprint()))

    def build_plain(self, documents: Documents | None) -> Tokenizer:
        """UserError if the run keeps no tokenizer, or several."""
        records = Path(self.model_dir).expanduser().glob(f"data/*/{RECORD}")
        tokenizers = [read_tokenizer(record.parent) for record in records]
        found = {tokenizer.fingerprint(): tokenizer for tokenizer in tokenizers}
        if len(found) != 1:
            raise UserError(
                f"RunTokenizerConfig.model_dir={self.model_dir!r} keeps {len(found)} tokenizers in its directory data: "
                "name the directory of one run; an imported model has none, give its file (SentencePieceFileConfig, "
                "TokenizerFileConfig)."
            )
        return next(iter(found.values()))
