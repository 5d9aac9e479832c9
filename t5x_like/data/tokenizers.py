"""Text to token ids and back: bytes, characters and words; `subwords` has SentencePiece.

A configuration's `build` makes the tokenizer of a run from the run's own text. Tokenizers are kept as plain files
beside the tokens that they made, so that the text is not needed again.
"""

import abc
import collections
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from t5x_like.configurable import configurable
from t5x_like.errors import UserError

VOCABULARY_FILE = "vocabulary.json"
"""The file every tokenizer has: its `type` and what a tokenizer of that type needs to be made again."""


class Documents(Protocol):
    """The text of a run, by part."""

    def train(self) -> Iterator[str]:
        """Yields the documents of the training split."""

    def all(self) -> Iterator[str]:
        """Yields the documents of both splits."""


class TokenizerConfig(abc.ABC):
    """What every tokenizer's configuration can do."""

    @abc.abstractmethod
    def build(self, documents: Documents) -> "Tokenizer":
        """The tokenizer, trained on the documents if it is one that is trained."""

    def cache_key(self) -> str:
        """Differs between configurations that may build different tokenizers from the same documents."""
        return repr(self)


class Tokenizer(abc.ABC):
    """Maps text to token ids and back.

    Attributes:
      vocab_size: Number of ids.
      bos_id: The id that a document follows, the first input of a text written from nothing; None if there is none.
        Our own tokenizers use `eos_id`: a document follows the end of another.
      eos_id: The id that ends a document; None if documents have no marked end.
      pad_id: The id of positions without a token; None if the tokenizer has none (0 stands there, with weight 0).
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @abc.abstractmethod
    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """The tokens of a text; no bos or eos is added."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bos, eos, pad and ids outside of the vocabulary give no text."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """File names and contents from which `load_tokenizer` makes the same tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """Differs between tokenizers that are not the same."""
        digest = hashlib.blake2b(digest_size=16)
        for name, content in sorted(self.files().items()):
            digest.update(f"{name}:{len(content)}:".encode() + content)
        return digest.hexdigest()

    def save(self, directory: Path):
        """Writes the tokenizer's files."""
        for name, content in self.files().items():
            (directory / name).write_bytes(content)


@configurable
class ByteTokenizerConfig(TokenizerConfig):
    """UTF-8 bytes, numbered as in ByT5 (Xue et al. 2021, https://arxiv.org/abs/2105.13626): 259 ids, no training."""

    def build(self, documents: Documents) -> "ByteTokenizer":
        return ByteTokenizer()


class ByteTokenizer(Tokenizer):
    """Byte b is id b + 3, after pad 0, eos 1 and unk 2."""

    vocab_size = 259
    pad_id, eos_id = 0, 1
    bos_id = eos_id

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return _vocabulary(type="byte")


@configurable
class CharacterTokenizerConfig(TokenizerConfig):
    """One id per distinct character of the run's whole text, in sorted order, and no other ids (as nanoGPT)."""

    def build(self, documents: Documents) -> "CharacterTokenizer":
        # Both splits: a character that only the validation split has must have an id too.
        characters = set()
        for text in documents.all():
            characters.update(text)
        return CharacterTokenizer("".join(sorted(characters)))


class CharacterTokenizer(Tokenizer):
    """Character i of `characters` (sorted, distinct) is id i."""

    pad_id = eos_id = bos_id = None

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = len(characters)
        self._codes = _code_points(characters)

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """UserError for a character that the vocabulary lacks."""
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        unknown = self._codes[ids] != codes
        if unknown.any():
            place = int(unknown.argmax())
            raise UserError(
                f"Character {text[place]!r} (at {place}, in {text[max(place - 20, 0) : place + 20]!r}) is not among "
                f"the {self.vocab_size} characters of this run's text: leave it out, or train with another tokenizer."
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids if 0 <= i < self.vocab_size)

    def files(self) -> dict[str, bytes]:
        return _vocabulary(type="character", characters=self.characters)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@configurable
class WordTokenizerConfig(TokenizerConfig):
    """The most frequent words of the training split; any other word becomes `<unk>`, so that its text is lost.

    Losses over different vocabularies do not compare, not even per byte: a small vocabulary makes text easier.

    Attributes:
      vocab_size: Number of ids, pad, eos and unk included.
    """

    vocab_size: int = 8192

    def __post_init__(self):
        if self.vocab_size < 4:
            raise UserError(f"WordTokenizerConfig.vocab_size={self.vocab_size}: must be at least 4.")

    def build(self, documents: Documents) -> "WordTokenizer":
        """UserError when the text has fewer words than the vocabulary wants."""
        counts = collections.Counter()
        for text in documents.train():
            counts.update(_WORD.findall(text))
        largest = len(counts) + WordTokenizer.num_special
        if self.vocab_size > largest:
            raise UserError(
                f"WordTokenizerConfig.vocab_size={self.vocab_size} is larger than the corpus allows: "
                f"set it to {largest} or less."
            )
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return WordTokenizer(words[: self.vocab_size - WordTokenizer.num_special])


# A word or a run of punctuation takes the space before it along, so that decoding is concatenation.
_WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s")


class WordTokenizer(Tokenizer):
    """Word i of `words` is id i + 3, after pad 0, eos 1 and unk 2."""

    pad_id, eos_id, unk_id = 0, 1, 2
    bos_id = eos_id
    num_special = 3

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.vocab_size = len(words) + self.num_special
        self._ids = {word: i for i, word in enumerate(words, start=self.num_special)}
        self._texts = ("", "", "<unk>", *self.words)

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.array([self._ids.get(word, self.unk_id) for word in _WORD.findall(text)], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._texts[i] for i in ids if 0 <= i < self.vocab_size)

    def files(self) -> dict[str, bytes]:
        return _vocabulary(type="word", words=self.words)


def _vocabulary(**content) -> dict[str, bytes]:
    return {VOCABULARY_FILE: json.dumps(content).encode()}


def cut(text: str, size: int) -> Iterator[tuple[int, str]]:
    """Yields (start, piece) of a text cut into pieces of at most `size` characters, behind line ends where it can."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield start, text[start:end]
        start = end


def sample(texts: Iterable[str], num_characters: int, piece: int = 2000) -> list[str]:
    """Pieces from everywhere in the texts, at most `num_characters` in all, chosen in one pass; no randomness."""
    kept, size, stride = [], 0, 1
    pieces = (part for text in texts for _, part in cut(text, piece))
    for index, part in enumerate(pieces):
        if index % stride == 0:
            kept.append(part)
            size += len(part)
            while size > num_characters and len(kept) > 1:
                kept, stride = kept[::2], 2 * stride
                size = sum(map(len, kept))
    return kept
