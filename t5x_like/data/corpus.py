"""Text made ready, once: split, tokenised and kept in files that later starts map into memory.

The files of one preparation stand in a directory of their own, named by everything they depend on and renamed into
place when complete: a killed preparation leaves only a hidden directory, to be removed at will, and processes that
prepare the same corpus at the same time do no harm. Texts stream through: memory is bounded by the largest file.
"""

import array
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from jaxtyping import Int64, UInt

from t5x_like.data.json_tokenizers import JSON_FILE, JsonTokenizer
from t5x_like.data.sources import Source
from t5x_like.data.subwords import MODEL_FILE, SentencePieceTokenizer
from t5x_like.data.tokenizers import (
    SPECIAL_TOKENS_FILE,
    VOCABULARY_FILE,
    ByteTokenizer,
    CharacterTokenizer,
    ExtendedTokenizer,
    Tokenizer,
    TokenizerConfig,
    WordTokenizer,
    cut,
)
from t5x_like.errors import UserError
from t5x_like.files import DAMAGE, fingerprint, prepare_once

T = TypeVar("T")

_FORMAT = 1
RECORD = "prepared.json"
"""What stands beside the tokens: sizes and hashes."""
_PIECE = 2**14  # characters
_PIECES_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Split:
    """Divides documents into train and validation; the same text is always on the same side.

    Attributes:
      by: `document`: a hash of its content sends a document to one side, whatever its neighbours; `position`: the
        last characters of the whole text, in the order of the source, are the validation split (as nanoGPT).
      validation_fraction: Of the documents, or of the characters.
    """

    by: Literal["document", "position"]
    validation_fraction: float


def content_hash(text: str) -> int:
    """64 bits that equal texts share, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class SplitDocuments:
    """The documents of a source by split; every call reads the source again."""

    source: Source
    split: Split

    def all(self) -> Iterator[str]:
        return self.source.documents()

    def train(self) -> Iterator[str]:
        return self._side(validation=False)

    def validation(self) -> Iterator[str]:
        return self._side(validation=True)

    def _side(self, validation: bool) -> Iterator[str]:
        if self.split.by == "document":
            threshold = int(self.split.validation_fraction * 2**64)
            for text in self.source.documents():
                if (content_hash(text) < threshold) == validation:
                    yield text
            return
        left = int(sum(map(len, self.source.documents())) * (1 - self.split.validation_fraction))
        for text in self.source.documents():
            here = text[left:] if validation else text[:left]
            left = max(left - len(text), 0)
            if here:
                yield here


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The token stream of one split.

    A document is its tokens, then eos, with bos before them if bos is not eos; the first eos of the stream stands
    before all documents then. So every token of a document is the target of the token before it, the first too,
    whenever the tokenizer has an eos.

    Attributes:
      stream: All tokens, mapped from the file.
      starts: Where the targets of each document start in the stream; the input of a target is the token before it.
      ends: Where they end.
      num_bytes: Size of the text in UTF-8.
    """

    stream: UInt[np.ndarray, "tokens"]
    starts: Int64[np.ndarray, "documents"]
    ends: Int64[np.ndarray, "documents"]
    num_bytes: int

    @property
    def num_documents(self) -> int:
        return len(self.starts)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenised corpus; `fingerprint` is a hash of the tokens of both splits and of the tokenizer."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    fingerprint: str


def prepare_corpus(source: Source, tokenizer_config: TokenizerConfig, split: Split, directory: Path | None) -> Corpus:
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
        record[name] = _write_tokens(work / name, texts, tokenizer, record["dtype"])
    hashes = [tokenizer.fingerprint(), record["train"]["hash"], record["validation"]["hash"]]
    record["fingerprint"] = fingerprint(repr(hashes))
    (work / RECORD).write_text(json.dumps(record, indent=1))


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _write_tokens(path: Path, texts: Iterable[str], tokenizer: Tokenizer, dtype: str) -> dict:
    """Writes `path`.bin, the stream, and `path`.npy, starts and ends; returns what the record says about them."""
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    bos = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    starts, ends, num_bytes = array.array("q"), array.array("q"), 0
    with open(path.with_suffix(".bin"), "wb") as file:
        stream = StreamWriter(file, dtype)
        stream.write([] if bos else eos)
        for is_first, is_last, tokens, size in _encode(texts, tokenizer):
            if is_first:
                stream.write(bos)
                # With neither bos nor eos, nothing comes before the first token of a document: it is only an input.
                starts.append(stream.num_tokens + (not bos and not eos))
            stream.write(tokens)
            num_bytes += size
            if is_last:
                stream.write(eos)
                ends.append(stream.num_tokens)
    bounds = np.array([starts, ends], np.int64)
    np.save(path.with_suffix(".npy"), bounds)
    stream.digest.update(bounds.tobytes())
    return {
        "documents": len(starts),
        "bytes": num_bytes,
        "tokens": stream.num_tokens,
        "hash": stream.digest.hexdigest(),
    }


class StreamWriter:
    """Appends numbers to a file, and hashes them."""

    def __init__(self, file: BinaryIO, dtype: str):
        self.file, self.dtype = file, dtype
        self.num_tokens = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def write(self, tokens: Sequence[int]):
        raw = np.asarray(tokens, self.dtype).tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.num_tokens += len(tokens)


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[bool, bool, np.ndarray, int]]:
    """Yields (first of its document, last of its document, tokens, bytes) of pieces of the documents.

    Long documents are cut behind line ends and pieces encoded many at once: a tokenizer can use all cores, and no
    document, however long, needs much memory.
    """
    pieces = (
        (start == 0, start + len(piece) == len(text), piece) for text in texts for start, piece in cut(text, _PIECE)
    )
    while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        encoded = tokenizer.encode_batch([piece for _, _, piece in batch])
        for (is_first, is_last, piece), tokens in zip(batch, encoded, strict=True):
            yield is_first, is_last, tokens, len(piece.encode())


def _load(place: Path) -> Corpus:
    record = json.loads((place / RECORD).read_text())
    return Corpus(
        tokenizer=read_tokenizer(place),
        train=_load_tokens(place / "train", record["train"], record["dtype"]),
        validation=_load_tokens(place / "validation", record["validation"], record["dtype"]),
        fingerprint=record["fingerprint"],
    )


def _load_tokens(path: Path, record: dict, dtype: str) -> Tokens:
    starts, ends = np.load(path.with_suffix(".npy"), mmap_mode="r")
    stream = map_stream(path.with_suffix(".bin"), dtype, record["tokens"])
    return Tokens(stream, starts, ends, record["bytes"])


def map_stream(file: Path, dtype: str, size: int) -> UInt[np.ndarray, "tokens"]:
    """The numbers in a file, so many, mapped into memory; UserError if there are not so many."""
    if file.stat().st_size != size * np.dtype(dtype).itemsize:
        raise UserError(f"{file} is damaged: remove {file.parent}, it will be prepared again.")
    # An empty file cannot be mapped.
    return np.memmap(file, dtype, mode="r") if size else np.zeros(0, dtype)


def read_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer whose files stand in a directory."""
    tokenizer = _read_plain_tokenizer(place)
    names = place / SPECIAL_TOKENS_FILE
    return ExtendedTokenizer(tokenizer, json.loads(names.read_text())) if names.exists() else tokenizer


def _read_plain_tokenizer(place: Path) -> Tokenizer:
    path = place / VOCABULARY_FILE
    try:
        vocabulary = json.loads(path.read_text())
        match vocabulary:
            case {"type": "byte"}:
                return ByteTokenizer()
            case {"type": "character", "characters": str(characters)} if characters:
                return CharacterTokenizer(characters)
            case {"type": "word", "words": [*words]} if all(isinstance(word, str) for word in words):
                return WordTokenizer(words)
            case {"type": "json", "names": {**names}}:
                return JsonTokenizer((place / JSON_FILE).read_bytes(), names)
            case {"type": "sentencepiece"}:
                return SentencePieceTokenizer((place / MODEL_FILE).read_bytes())
    except DAMAGE as error:
        raise UserError(f"The tokenizer in {place} is damaged ({error}): bring back its files.") from error
    raise UserError(f"{path} describes no tokenizer that this version knows: bring back the file.")
