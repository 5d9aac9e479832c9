"""The token stream of a split: how it is written to a file, and mapped into memory from there."""

import array
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64, UInt

from t5x_like.data.tokenizers import Tokenizer, cut
from t5x_like.errors import UserError

_PIECE = 2**14  # characters
_PIECES_AT_ONCE = 256


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


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_tokens(path: Path, texts: Iterable[str], tokenizer: Tokenizer, dtype: str) -> dict:
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


def read_tokens(path: Path, record: dict, dtype: str) -> Tokens:
    starts, ends = np.load(path.with_suffix(".npy"), mmap_mode="r")
    stream = map_stream(path.with_suffix(".bin"), dtype, record["tokens"])
    return Tokens(stream, starts, ends, record["bytes"])


def map_stream(file: Path, dtype: str, size: int) -> UInt[np.ndarray, "tokens"]:
    """The numbers in a file, so many, mapped into memory; UserError if there are not so many."""
    if file.stat().st_size != size * np.dtype(dtype).itemsize:
        raise UserError(f"{file} is damaged: remove {file.parent}, it will be prepared again.")
    # An empty file cannot be mapped.
    return np.memmap(file, dtype, mode="r") if size else np.zeros(0, dtype)
