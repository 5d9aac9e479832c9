"""Text made ready, once: split, tokenised and kept in files that later starts map into memory.

The files of one preparation stand in a directory of their own, named by everything they depend on and renamed into
place when complete: a killed preparation leaves only a hidden directory, to be removed at will, and processes that
prepare the same corpus at the same time do no harm. Texts stream through: memory is bounded by the largest file.
"""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from t5x_like.data.splits import Split, SplitDocuments, Texts
from t5x_like.data.tokenizers import Tokenizer, TokenizerConfig, read_tokenizer
from t5x_like.data.tokens import Tokens, read_tokens, token_dtype, write_tokens
from t5x_like.errors import UserError
from t5x_like.files import fingerprint, prepare_once

T = TypeVar("T")

_FORMAT = 1
RECORD = "prepared.json"
"""What stands beside the tokens: sizes and hashes."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenised corpus; `fingerprint` is a hash of the tokens of both splits and of the tokenizer."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    fingerprint: str


def prepare_corpus(source: Texts, tokenizer_config: TokenizerConfig, split: Split, directory: Path | None) -> Corpus:
    """Splits and tokenises the source, training the tokenizer when it has to, or loads what an earlier call made.

    Args:
      source: The documents.
      tokenizer_config: One of the tokenizers' configurations.
      split: What is validation.
      directory: Where prepared corpora are kept; None keeps nothing.

    Raises:
      UserError: from the source or the tokenizer, or if the directory cannot be written.
    """
    key = repr((_FORMAT, source.cache_key(), tokenizer_config.cache_key(), split))
    make = lambda work: _prepare(SplitDocuments(source, split), tokenizer_config, work)
    return prepare_once(key, directory, make, _load, f"{source}, {tokenizer_config}")


def load_tokenizer(directory: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer of this fingerprint, kept with a corpus prepared in `directory`; needs no text.

    Raises:
      UserError: if it is not there.
    """
    for record in sorted(directory.glob(f"*/{RECORD}")):
        tokenizer = read_tokenizer(record.parent)
        if tokenizer.fingerprint() == fingerprint:
            return tokenizer
    raise UserError(f"{directory} does not hold the tokenizer that the model was trained with: bring it back.")


def keep_tokenizer(directory: Path, tokenizer: Tokenizer):
    """Keeps a tokenizer where `load_tokenizer` finds it, without a corpus."""
    place = directory / tokenizer.fingerprint()
    place.mkdir(parents=True, exist_ok=True)
    tokenizer.save(place)
    (place / RECORD).write_text(json.dumps({"tokenizer": tokenizer.fingerprint()}))


def _prepare(documents: SplitDocuments, tokenizer_config: TokenizerConfig, work: Path):
    tokenizer = tokenizer_config.build(documents)
    tokenizer.save(work)
    record = {"dtype": token_dtype(tokenizer.vocab_size)}
    for name, texts in (("train", documents.train()), ("validation", documents.validation())):
        record[name] = write_tokens(work / name, texts, tokenizer, record["dtype"])
    hashes = [tokenizer.fingerprint(), record["train"]["hash"], record["validation"]["hash"]]
    record["fingerprint"] = fingerprint(repr(hashes))
    (work / RECORD).write_text(json.dumps(record, indent=1))


def _load(place: Path) -> Corpus:
    record = json.loads((place / RECORD).read_text())
    return Corpus(
        tokenizer=read_tokenizer(place),
        train=read_tokens(place / "train", record["train"], record["dtype"]),
        validation=read_tokens(place / "validation", record["validation"], record["dtype"]),
        fingerprint=record["fingerprint"],
    )
