"""Tokenizers of Hugging Face's `tokenizers`: a `tokenizer.json` that exists, or WordPiece and byte-level BPE, trained.

The library is in the extra `tasks`.
"""

import collections
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int32

from t5x_like.configurable import configurable
from t5x_like.data.extras import require
from t5x_like.data.tokenizers import (
    Documents,
    ExistingTokenizerConfig,
    SizedTokenizerConfig,
    SpecialTokens,
    Tokenizer,
    sample,
)
from t5x_like.errors import UserError
from t5x_like.files import fingerprint

JSON_FILE = "tokenizer.json"

# What families call these tokens; `tokenizer.json` does not say.
_USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}


@configurable
class TokenizerFileConfig(ExistingTokenizerConfig):
    """A `tokenizer.json` that exists: of BERT, GPT-2, Llama 3, Qwen and others.

    Attributes:
      file: Path of the file.
      bos_token: The token that a text follows; None: the one of a usual name, if there is any.
      eos_token: The token that ends a text; None: as above.
      pad_token: The token of places without one; None: as above.
      special_tokens: Ids behind those of the file, for the tokens that it has not got itself.
    """

    file: str
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    special_tokens: SpecialTokens = SpecialTokens()

    def cache_key(self) -> str:
        content = fingerprint(self._read())
        return repr((content, self.bos_token, self.eos_token, self.pad_token, self.special_tokens))

    def build_plain(self, documents: Documents | None) -> "JsonTokenizer":
        """UserError if the file is no tokenizer, or has no token of a name that is given."""
        given = {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token}
        try:
            return JsonTokenizer(self._read(), given)
        except KeyError as error:
            raise UserError(f"{self.file} has no token {error}: name one that it has.") from error
        except UserError:
            raise
        except Exception as error:  # The library raises nothing more special.
            raise UserError(f"{self.file} is no tokenizer.json ({error}).") from error

    def _read(self) -> bytes:
        try:
            return Path(self.file).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"TokenizerFileConfig.file: cannot read it: {error}.") from error


@configurable
class WordPieceConfig(SizedTokenizerConfig):
    """BERT's subwords (Devlin et al. 2019; Schuster and Nakajima 2012), trained: [PAD] 0, [UNK] 1, then the others.

    White space is lost, and so is case if `lowercase`.

    Attributes:
      vocab_size: Number of ids, [PAD] and [UNK] included.
      lowercase: Also takes accents off.
      sample_size: Characters to train on, taken from all over the split.
      special_tokens: Ids behind these.
    """

    vocab_size: int = 8192
    lowercase: bool = True
    sample_size: int = 20_000_000
    special_tokens: SpecialTokens = SpecialTokens()

    def build_plain(self, documents: Documents) -> "JsonTokenizer":
        library = require("tokenizers", "WordPieceConfig", "tasks")
        tokenizer = self._untrained(library, {})
        split = lambda text: tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        texts = [[word for word, _ in split(text)] for text in sample(documents.train(), self.sample_size)]
        common = {
            letter for letter, _ in collections.Counter(itertools.chain(*itertools.chain(*texts))).most_common(1000)
        }
        texts = [[word for word in words if common.issuperset(word)] for words in texts]
        letters = {word[0] for words in texts for word in words}
        letters |= {f"##{letter}" for words in texts for word in words for letter in word[1:]}
        # The library numbers letters in a random order, which decides between merges that are equally frequent.
        special = ["[PAD]", "[UNK]", *sorted(letters)]
        options = {"special_tokens": special, "limit_alphabet": len(letters), "show_progress": False}
        trainer = library.trainers.WordPieceTrainer(vocab_size=self.vocab_size, **options)
        tokenizer.train_from_iterator(map(" ".join, texts), trainer)
        vocabulary = tokenizer.get_vocab()
        _check_size("WordPieceConfig", self.vocab_size, len(vocabulary))
        trained = self._untrained(library, vocabulary)
        trained.add_special_tokens(special[:2])
        return JsonTokenizer(trained.to_str().encode())

    def _untrained(self, library: ModuleType, vocabulary: dict[str, int]) -> Any:
        tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = library.decoders.WordPiece()
        return tokenizer


def _check_size(config: str, wanted: int, largest: int) -> None:
    if largest < wanted:
        raise UserError(
            f"{config}.vocab_size={wanted} is larger than the corpus allows: set it to {largest} or less, or use more "
            "text."
        )
    if largest > wanted:
        raise UserError(
            f"{config}.vocab_size={wanted} is smaller than the text's letters: set it to {largest} or more."
        )


@configurable
class ByteBPEConfig(SizedTokenizerConfig):
    """GPT-2's subwords (Radford et al. 2019, section 2.2), trained: merges of bytes, nothing is lost.

    Attributes:
      vocab_size: Number of ids, the 256 bytes and <|endoftext|> (id 0) included.
      sample_size: Characters to train on, taken from all over the split.
      special_tokens: Ids behind these.
    """

    vocab_size: int = 8192
    sample_size: int = 20_000_000
    special_tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self):
        if self.vocab_size < 257:
            raise UserError(f"ByteBPEConfig.vocab_size={self.vocab_size}: must be at least 257, the bytes and an end.")

    def build_plain(self, documents: Documents) -> "JsonTokenizer":
        library = require("tokenizers", "ByteBPEConfig", "tasks")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": sorted(alphabet), "show_progress": False}
        trainer = library.trainers.BpeTrainer(vocab_size=self.vocab_size, **options)
        tokenizer.train_from_iterator(sample(documents.train(), self.sample_size), trainer)
        _check_size("ByteBPEConfig", self.vocab_size, tokenizer.get_vocab_size())
        return JsonTokenizer(tokenizer.to_str().encode())


class JsonTokenizer(Tokenizer, kind="json"):
    """A tokenizer from the content of its `tokenizer.json`; what it marks as special is never found in a text."""

    def __init__(self, content: bytes, names: dict[str, str | None] | None = None):
        """Reads it.

        Args:
          content: Of the file.
          names: Of the tokens `bos`, `eos` and `pad`; None, or what is missing: tokens of usual names.

        Raises:
          KeyError: if there is no token of a name.
        """
        library = require("tokenizers", "A tokenizer.json", "tasks")
        self._content, self._names = content, names or {}
        self._tokenizer = library.Tokenizer.from_str(content.decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: number for number, token in sorted(added.items()) if token.special}
        self.bos_id, self.eos_id, self.pad_id = map(self._id_of, ("bos", "eos", "pad"))
        if self.bos_id is None:
            self.bos_id = self.eos_id
        self.unk_id = self._ids.get(json.loads(content)["model"].get("unk_token"))

    def _id_of(self, kind: str) -> int | None:
        if (name := self._names.get(kind)) is not None:
            return self._ids[name]
        return next((self._ids[name] for name in _USUAL[kind] if name in self._ids), None)

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
        return [np.array(one.ids, np.int32) for one in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        silent = {self.bos_id, self.eos_id, self.pad_id}
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in silent]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        spell = _speller(json.loads(self._content))
        texts = [b""] * self.vocab_size
        silent = {*self.special_ids.values(), self.bos_id, self.eos_id, self.pad_id}
        for token, number in self._ids.items():
            if number not in silent:
                texts[number] = spell(token)
        return texts

    def files(self) -> dict[str, bytes]:
        return {**self.described(names=self._names), JSON_FILE: self._content}

    @classmethod
    def read(cls, facts: Mapping[str, Any], directory: Path) -> "JsonTokenizer":
        return cls((directory / JSON_FILE).read_bytes(), dict(facts["names"]))


def _speller(content: dict[str, Any]):
    """The function from a token, as the file writes it, to the bytes that it stands for."""
    ways = json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    if '"ByteLevel"' in ways:
        table = {character: byte for byte, character in enumerate(_byte_characters())}
        return lambda token: bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    if content["model"]["type"] == "WordPiece":
        prefix = content["model"]["continuing_subword_prefix"]
        return lambda token: (token.removeprefix(prefix) if token.startswith(prefix) else f" {token}").encode()

    def spell(token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    return spell


def _byte_characters() -> str:
    """The character that byte-level BPE writes for each byte: itself if it can be seen, or else one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return "".join(chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256))
