"""Text to token ids and back: bytes, characters and words; `subwords` has SentencePiece.

A configuration's `build` makes the tokenizer of a run from the run's own text. Tokenizers are kept as plain files
beside the tokens that they made, so that the text is not needed again.
"""

import abc
import collections
import itertools
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.files import DAMAGE, fingerprint

VOCABULARY_FILE = "vocabulary.json"
"""The file every tokenizer has: its `type` and what a tokenizer of that type needs to be made again."""

SPECIAL_TOKENS_FILE = "special_tokens.json"
"""Names of the ids behind the vocabulary, if there are any."""

SENTINEL = "<extra_id_{}>"
SPECIAL_TOKENS_FIELD = "the field special_tokens = @SpecialTokens() of the tokenizer"


class Documents(Protocol):
    """The text of a run, by part."""

    def train(self) -> Iterator[str]:
        """Yields the documents of the training split."""

    def all(self) -> Iterator[str]:
        """Yields the documents of both splits."""


@configurable
class SpecialTokens:
    """Tokens that stand for no text and that no text is encoded to; their ids follow those of the vocabulary.

    Attributes:
      names: `[MASK]`, `[CLS]` and `[SEP]` for masked language models, `[R]`, `[S]` and `[X]` for UL2, and any other.
      num_sentinels: how many of `<extra_id_0>`, `<extra_id_1>`, ... there are; the first has the highest id (as in T5).
    """

    names: tuple[str, ...] = ()
    num_sentinels: int = 0

    def __post_init__(self):
        if len(set(self.names)) < len(self.names) or not all(self.names):
            raise UserError(f"SpecialTokens.names={self.names!r}: every name must be there once, and not be empty.")
        if self.num_sentinels < 0:
            raise UserError(f"SpecialTokens.num_sentinels={self.num_sentinels}: must be at least 0.")

    @property
    def count(self) -> int:
        return len(self.names) + self.num_sentinels

    def extend(self, tokenizer: "Tokenizer") -> "Tokenizer":
        """The tokenizer with those of the tokens that it lacks."""
        wanted = (*self.names, *map(SENTINEL.format, reversed(range(self.num_sentinels))))
        names = [name for name in wanted if name not in tokenizer.special_ids]
        return ExtendedTokenizer(tokenizer, names) if names else tokenizer


class TokenizerConfig(abc.ABC):
    """The tokenizer of a run, which is trained on the run's text or exists already.

    Attributes:
      special_tokens: Ids behind its own.
    """

    special_tokens: SpecialTokens = SpecialTokens()

    def build(self, documents: Documents | None) -> "Tokenizer":
        """The tokenizer, trained on the documents if it is one that is trained, with its special tokens."""
        return self.special_tokens.extend(self.build_plain(documents))

    @abc.abstractmethod
    def build_plain(self, documents: Documents) -> "Tokenizer":
        """The tokenizer without its special tokens."""

    def cache_key(self) -> str:
        """Differs between configurations that may build different tokenizers from the same documents."""
        return repr(self)

    def known_size(self) -> int | None:
        """The number of ids, special tokens included, without reading any text; None where the text decides it."""
        return None


class SizedTokenizerConfig(TokenizerConfig):
    """A tokenizer that learns a vocabulary of a size that is given.

    Attributes:
      vocab_size: Number of ids, without special tokens.
    """

    vocab_size: int

    def known_size(self) -> int:
        return self.vocab_size + self.special_tokens.count


class ExistingTokenizerConfig(TokenizerConfig):
    """A tokenizer that is what it is, whatever the text: it is built without documents."""

    def known_size(self) -> int:
        return self.build(None).vocab_size


KINDS: dict[str, type["Tokenizer"]] = {}
"""Tokenizers by what their files call them."""


class Tokenizer(abc.ABC):
    """Maps text to token ids and back; `class MyTokenizer(Tokenizer, kind="mine")` names the kind in its files.

    Attributes:
      kind: What its files call it.
      vocab_size: Number of ids.
      bos_id: The id that a document follows, the first input of a text written from nothing; None if there is none.
        Our own tokenizers use `eos_id`: a document follows the end of another.
      eos_id: The id that ends a document; None if documents have no marked end.
      pad_id: The id of positions without a token; None if the tokenizer has none (0 stands there, with weight 0).
      unk_id: The id that stands for what the vocabulary lacks; None if nothing does.
      special_ids: The ids of special tokens by name; see `SpecialTokens`.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None = None
    special_ids: Mapping[str, int] = types.MappingProxyType({})

    def __init_subclass__(cls, kind: str | None = None):
        if kind is not None:
            known = KINDS.get(kind)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise UserError(f"{cls.__name__}: {known.__module__} has a tokenizer of kind {kind!r}: choose another.")
            cls.kind = kind
            KINDS[kind] = cls

    @abc.abstractmethod
    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """The tokens of a text; no bos or eos is added."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bos, eos, pad and ids outside of the vocabulary give no text.

        Special tokens give their names.
        """

    @abc.abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The text of each id in UTF-8, a character's bytes perhaps in several; empty for those without text."""

    def files(self) -> dict[str, bytes]:
        """File names and contents from which `read` makes the same tokenizer."""
        return self.described()

    def described(self, **facts) -> dict[str, bytes]:
        """The file that every tokenizer has: its kind, and these facts."""
        return {VOCABULARY_FILE: json.dumps({"type": self.kind, **facts}).encode()}

    @classmethod
    def read(cls, facts: Mapping[str, Any], directory: Path) -> "Tokenizer":
        """The tokenizer of these facts, whose other files stand in the directory; any of `DAMAGE` if they cannot be."""
        return cls()

    def special_id(self, name: str) -> int:
        """The id of a special token; UserError if there is none."""
        if name not in self.special_ids:
            raise UserError(
                f"The tokenizer has no token {name}: add it to SpecialTokens.names ({SPECIAL_TOKENS_FIELD})."
            )
        return self.special_ids[name]

    @property
    def mask_id(self) -> int:
        return self.special_id("[MASK]")

    @property
    def cls_id(self) -> int:
        return self.special_id("[CLS]")

    @property
    def sep_id(self) -> int:
        return self.special_id("[SEP]")

    @property
    def num_sentinels(self) -> int:
        return next(number for number in itertools.count() if SENTINEL.format(number) not in self.special_ids)

    def sentinel(self, number: int) -> int:
        """The id of `<extra_id_number>`; UserError if there are not so many."""
        if number >= self.num_sentinels:
            raise UserError(
                f"The tokenizer has {self.num_sentinels} sentinels and sentinel {number} is needed: set "
                f"SpecialTokens.num_sentinels to {number + 1} or more ({SPECIAL_TOKENS_FIELD})."
            )
        return self.special_ids[SENTINEL.format(number)]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """Differs between tokenizers that are not the same."""
        files = sorted(self.files().items())
        return fingerprint(b"".join(f"{name}:{len(content)}:".encode() + content for name, content in files))

    def save(self, directory: Path):
        """Writes the tokenizer's files."""
        for name, content in self.files().items():
            (directory / name).write_bytes(content)


class ExtendedTokenizer(Tokenizer):
    """A tokenizer with special tokens, whose ids follow its own in the order of `names`."""

    def __init__(self, base: Tokenizer, names: Sequence[str]):
        self.base, self.names = base, tuple(names)
        self.vocab_size = base.vocab_size + len(names)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = base.bos_id, base.eos_id, base.pad_id, base.unk_id
        self.special_ids = {**base.special_ids, **{name: base.vocab_size + i for i, name in enumerate(names)}}

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return self.base.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
        return self.base.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        first = self.base.vocab_size
        is_special = lambda i: first <= i < self.vocab_size
        runs = [(special, list(run)) for special, run in itertools.groupby(map(int, ids), key=is_special)]
        return "".join(
            "".join(self.names[i - first] for i in run) if special else self.base.decode(run) for special, run in runs
        )

    def token_bytes(self) -> list[bytes]:
        return self.base.token_bytes() + [b""] * len(self.names)

    def files(self) -> dict[str, bytes]:
        return self.base.files() | {SPECIAL_TOKENS_FILE: json.dumps(self.names).encode()}


@configurable
class ByteTokenizerConfig(ExistingTokenizerConfig):
    """UTF-8 bytes, numbered as in ByT5 (Xue et al. 2021, https://arxiv.org/abs/2105.13626): 259 ids, no training.

    Attributes:
      special_tokens: Ids behind these.
    """

    special_tokens: SpecialTokens = SpecialTokens()

    def build_plain(self, documents: Documents | None) -> "ByteTokenizer":
        return ByteTokenizer()


class ByteTokenizer(Tokenizer, kind="byte"):
    """Byte b is id b + 3, after pad 0, eos 1 and unk 2."""

    vocab_size = 259
    pad_id, eos_id = 0, 1
    bos_id = eos_id

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [b"", b"", b"", *(bytes([byte]) for byte in range(256))]


@configurable
class CharacterTokenizerConfig(TokenizerConfig):
    """One id per distinct character of the run's whole text, in sorted order, and no other ids (as nanoGPT).

    Attributes:
      special_tokens: Ids behind these.
    """

    special_tokens: SpecialTokens = SpecialTokens()

    def build_plain(self, documents: Documents) -> "CharacterTokenizer":
        # Both splits: a character that only the validation split has must have an id too.
        characters = set()
        for text in documents.all():
            characters.update(text)
        return CharacterTokenizer("".join(sorted(characters)))


class CharacterTokenizer(Tokenizer, kind="character"):
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

    def token_bytes(self) -> list[bytes]:
        return [character.encode() for character in self.characters]

    def files(self) -> dict[str, bytes]:
        return self.described(characters=self.characters)

    @classmethod
    def read(cls, facts: Mapping[str, Any], directory: Path) -> "CharacterTokenizer":
        if not facts["characters"]:
            raise ValueError("it has no characters")
        return cls(facts["characters"])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@configurable
class WordTokenizerConfig(SizedTokenizerConfig):
    """The most frequent words of the training split; any other word becomes `<unk>`, so that its text is lost.

    Losses over different vocabularies do not compare, not even per byte: a small vocabulary makes text easier.

    Attributes:
      vocab_size: Number of ids, pad, eos and unk included.
      special_tokens: Ids behind these.
    """

    vocab_size: int = 8192
    special_tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self):
        if self.vocab_size < 4:
            raise UserError(f"WordTokenizerConfig.vocab_size={self.vocab_size}: must be at least 4.")

    def build_plain(self, documents: Documents) -> "WordTokenizer":
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


class WordTokenizer(Tokenizer, kind="word"):
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

    def token_bytes(self) -> list[bytes]:
        return [b"", b"", b"", *(word.encode() for word in self.words)]

    def files(self) -> dict[str, bytes]:
        return self.described(words=self.words)

    @classmethod
    def read(cls, facts: Mapping[str, Any], directory: Path) -> "WordTokenizer":
        if not all(isinstance(word, str) for word in facts["words"]):
            raise ValueError("its words are no texts")
        return cls(facts["words"])


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text in which special tokens may stand by name: "Copy <extra_id_0> directories"."""
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    tokens = []
    for part in filter(None, parts):
        known = tokenizer.special_ids.get(part)
        tokens += tokenizer.encode(part).tolist() if known is None else [known]
    return tokens


def read_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer whose files stand in a directory; UserError where they are not as they were written."""
    path, names = place / VOCABULARY_FILE, place / SPECIAL_TOKENS_FILE
    try:
        facts = json.loads(path.read_text())
        if (cls := KINDS.get(facts["type"])) is None:
            raise UserError(f"{path} describes no tokenizer that this version knows: bring back the file.")
        tokenizer = cls.read(facts, place)
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The tokenizer in {place} is damaged ({error}): bring back its files.") from error
    return ExtendedTokenizer(tokenizer, json.loads(names.read_text())) if names.exists() else tokenizer


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
