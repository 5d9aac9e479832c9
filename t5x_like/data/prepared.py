"""Corpora that `t5x_like prepare` made, as sources of training and of tokenizers."""

import hashlib
from pathlib import Path

import numpy as np
from absl import logging

from t5x_like.configurable import configurable
from t5x_like.data.corpus import Corpus, Split, read_tokenizer
from t5x_like.data.shards import TOKENIZER, Shards, read_prepared
from t5x_like.data.tokenizers import Documents, SpecialTokens, Tokenizer, TokenizerConfig
from t5x_like.errors import UserError


@configurable
class PreparedSource:
    """A corpus in shards, with its own tokenizer: what `t5x_like prepare --to=DIRECTORY` made.

    Attributes:
      directory: Of the corpus.
      max_bad_shards: Shards that may be missing or cut off; they are left out, which makes it another corpus.
      special_tokens: Ids behind those of its vocabulary, for objectives that need them.
    """

    directory: str
    max_bad_shards: int = 0
    special_tokens: SpecialTokens = SpecialTokens()

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
            fingerprint=hashlib.blake2b(facts.encode(), digest_size=16).hexdigest(),
        )


@configurable
class PreparedTokenizerConfig(TokenizerConfig):
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
