"""Tokens of documents in ArrayRecord files, and any subset of the documents as one stream with random access.

A directory of shards holds `prepared.json`, the tokenizer, and for each shard an ArrayRecord file and an index. A
record is the tokens of one document as little-endian integers, bos and eos included; long documents take several.
The index (`.npy`) has a row for each document: its tokens, its bytes of text, and the hash of the text.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Bool, Int64, Shaped, UInt

from t5x_like.data.splits import content_hash
from t5x_like.data.tokenizers import Tokenizer, cut
from t5x_like.data.tokens import Tokens, token_dtype
from t5x_like.errors import UserError
from t5x_like.files import fingerprint

PREPARED = "prepared.json"
TOKENIZER = "tokenizer"
INDEX = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("hash", "<u8")])
RECORD_TOKENS = 2**14
PIECE = 2**14  # characters encoded at once, as in `corpus`

_WRITER_OPTIONS = "group_size:1,uncompressed"  # Tokens hardly compress, and reading is what counts.
_READER_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 2**15}
_OPEN_READERS = 256


class Shard(NamedTuple):
    """What `prepared.json` says of a shard: sizes, and a hash of its records and its index."""

    name: str
    documents: int
    tokens: int
    bytes: int
    file_bytes: int
    hash: str


class ShardWriter:
    """Writes the documents of one shard; the files are complete when `close` returns."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        """Opens `path`.array_record.

        Args:
          path: Of the shard, without a suffix.
          tokenizer: Makes the tokens.
        """
        self._path, self._tokenizer = path, tokenizer
        self._before, self._after, _ = _marks(tokenizer)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._writer = ArrayRecordWriter(str(path.with_suffix(".array_record")), _WRITER_OPTIONS)
        self._index: list[tuple[int, int, int]] = []
        self._digest = hashlib.blake2b(digest_size=16)

    def write(self, text: str) -> UInt[np.ndarray, "tokens"]:
        """Adds a document, and returns its tokens without bos and eos."""
        pieces = [self._tokenizer.encode(piece) for _, piece in cut(text, PIECE)]
        tokens = np.concatenate([self._before, *pieces, self._after]).astype(self._dtype)
        for start in range(0, len(tokens), RECORD_TOKENS):
            record = tokens[start : start + RECORD_TOKENS].tobytes()
            self._writer.write(record)
            self._digest.update(record)
        self._index.append((len(tokens), len(text.encode()), content_hash(text)))
        return tokens[len(self._before) : len(tokens) - len(self._after)]

    def close(self) -> Shard:
        self._writer.close()
        index = np.array(self._index, INDEX)
        np.save(self._path.with_suffix(".npy"), index)
        self._digest.update(index.tobytes())
        return Shard(
            name=self._path.name,
            documents=len(index),
            tokens=int(index["tokens"].sum()),
            bytes=int(index["bytes"].sum()),
            file_bytes=self._path.with_suffix(".array_record").stat().st_size,
            hash=self._digest.hexdigest(),
        )


def _marks(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The tokens before a document, behind it, and before the first of a stream: see `corpus.Tokens`."""
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    bos = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    return bos, eos, [] if bos else eos


class Shards:
    """The documents of a directory of shards.

    Attributes:
      index: A row of the dtype `INDEX` for each document.
      fingerprint: A hash of the shards in use and the tokenizer.
    """

    index: Shaped[np.ndarray, "documents"]

    def __init__(self, directory: Path, tokenizer: Tokenizer, *, max_bad_shards: int = 0):
        """Reads the index.

        Args:
          directory: Of a finished preparation.
          tokenizer: The one that made the tokens.
          max_bad_shards: Shards that may be missing or cut off; they are left out.

        Raises:
          UserError: names the shards that are missing or cut off if they are more, or a tokenizer that is another.
        """
        self._directory, self._tokenizer = directory, tokenizer
        record = read_prepared(directory)
        if tokenizer.fingerprint() != record["tokenizer"]:
            raise UserError(
                f"{directory} was tokenised with another tokenizer than {directory / TOKENIZER} holds: bring back the "
                "one it was prepared with, or prepare the corpus again."
            )
        listed = [Shard(**fields) for fields in record["shards"]]
        bad = {shard.name: why for shard in listed if (why := self._damage(shard))}
        if len(bad) > max_bad_shards:
            raise UserError(
                f"{directory} has {len(bad)} damaged shards of {len(listed)}: "
                + "; ".join(f"{name} ({why})" for name, why in list(bad.items())[:5])
                + f". Bring them back, prepare the corpus again, or do without: max_bad_shards = {len(bad)}."
            )
        self.bad = bad
        self._shards = [shard for shard in listed if shard.name not in bad]
        self.index = np.concatenate([np.zeros(0, INDEX), *(np.load(self._path(s, ".npy")) for s in self._shards)])
        self._dtype = record["dtype"]
        num_records = -(-self.index["tokens"].astype(np.int64) // RECORD_TOKENS)
        self._first_record = np.cumsum(num_records) - num_records
        bounds = np.cumsum([0, *(shard.documents for shard in self._shards)])
        # The global number of each shard's first record, and of the end.
        self._shard_bounds = np.append(self._first_record, num_records.sum())[bounds]
        facts = (record["tokenizer"], [shard.hash for shard in self._shards])
        self.fingerprint = fingerprint(repr(facts))
        self._reader = functools.lru_cache(maxsize=_OPEN_READERS)(self._open)

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self._directory / f"{shard.name}{suffix}"

    def _damage(self, shard: Shard) -> str | None:
        """What is wrong with a shard, as far as sizes tell."""
        try:
            if self._path(shard, ".array_record").stat().st_size != shard.file_bytes:
                return "another size than when it was written"
            if len(np.load(self._path(shard, ".npy"), mmap_mode="r")) != shard.documents:
                return "an index of another size"
        except FileNotFoundError:
            return "missing"
        except (OSError, ValueError, EOFError) as error:
            return str(error)
        return None

    def _open(self, number: int) -> ArrayRecordReader:
        return ArrayRecordReader(str(self._path(self._shards[number], ".array_record")), **_READER_OPTIONS)

    def tokens(self, selected: Bool[np.ndarray, "documents"]) -> Tokens:
        """The selected documents as one stream; 40 bytes of memory for each of them."""
        rows = self.index[selected]
        before, after, lead = _marks(self._tokenizer)
        lengths = rows["tokens"].astype(np.int64)
        ends = np.cumsum(lengths) + len(lead)
        # The first token of a document is no target where nothing that is always the same comes before it.
        starts = ends - lengths + (1 if before or not after else 0)
        stream = ShardStream(self, self._first_record[selected], lengths, lead)
        return Tokens(stream, starts, ends, int(rows["bytes"].sum(dtype=np.int64)))

    def read(self, numbers: Int64[np.ndarray, "records"]) -> list[UInt[np.ndarray, "tokens"]]:
        """The records of these ascending numbers."""
        shard = np.searchsorted(self._shard_bounds, numbers, side="right") - 1
        place = numbers - self._shard_bounds[shard]
        contents = []
        for one in np.unique(shard).tolist():
            try:
                contents += self._reader(one).read(place[shard == one].tolist())
            except Exception as error:  # The reader has no type of its own for a failed checksum.
                path = self._path(self._shards[one], ".array_record")
                raise UserError(
                    f"{path} is damaged ({error}): remove it and set max_bad_shards to do without it, bring it back, "
                    "or prepare the corpus again."
                ) from error
        return [np.frombuffer(content, self._dtype) for content in contents]


class ShardStream:
    """Tokens of documents one after another, read from shards where they are asked for.

    Indexed as an array of tokens, by a slice or by places; consecutive places are read together.
    """

    def __init__(
        self,
        shards: Shards,
        first_records: Int64[np.ndarray, "documents"],
        lengths: Int64[np.ndarray, "documents"],
        lead: Sequence[int],
    ):
        """Lays the documents out; `lead` are tokens before the first of them."""
        self._shards, self._lead = shards, np.array(lead, shards._dtype)
        self.dtype = self._lead.dtype
        counts = -(-lengths // RECORD_TOKENS)
        document = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(document)) - (np.cumsum(counts) - counts)[document]
        sizes = np.minimum(lengths[document] - number * RECORD_TOKENS, RECORD_TOKENS)
        # The lead is a record without a number.
        before = [len(lead)] if lead else []
        self._records = np.concatenate([np.full(len(before), -1), first_records[document] + number])
        self._ends = np.cumsum(np.concatenate([np.array(before, np.int64), sizes]))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, places: slice | int | Int64[np.ndarray, "..."]) -> UInt[np.ndarray, "..."]:
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        flat = np.ravel(places)
        if not len(flat):
            return np.zeros(np.shape(places), self.dtype)
        if flat.min() < 0 or flat.max() >= len(self):
            raise IndexError(f"places from 0 to {len(self) - 1}, got {flat.min()} to {flat.max()}")
        turns = np.flatnonzero(np.diff(flat) != 1) + 1
        run_starts, run_ends = flat[np.append(0, turns)], flat[np.append(turns - 1, -1)] + 1
        first, last = (np.searchsorted(self._ends, at, side="right") for at in (run_starts, run_ends - 1))
        counts = last - first + 1
        run = np.repeat(np.arange(len(counts)), counts)
        record = first[run] + np.arange(len(run)) - (np.cumsum(counts) - counts)[run]
        ends = self._ends[record]
        begins = np.where(record > 0, self._ends[record - 1], 0)
        needed, where = np.unique(record, return_inverse=True)
        contents = self._read(needed)
        froms = np.maximum(run_starts[run], begins) - begins
        tos = np.minimum(run_ends[run], ends) - begins
        parts = [contents[w][a:b] for w, a, b in zip(where.tolist(), froms.tolist(), tos.tolist(), strict=True)]
        return np.concatenate(parts).reshape(np.shape(places))

    def _read(self, records: Int64[np.ndarray, "records"]) -> list[np.ndarray]:
        """The contents of these ascending places in the list of records."""
        numbers = self._records[records]
        lead = [self._lead] * int(numbers[0] < 0)
        return lead + self._shards.read(numbers[len(lead) :])


def read_prepared(directory: Path) -> dict[str, Any]:
    """What `prepared.json` says; UserError where there is none."""
    try:
        return json.loads((directory / PREPARED).read_text())
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no prepared corpus ({PREPARED} is missing): t5x_like prepare --from=FILES "
            f"--to={directory} makes one, or finishes it."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / PREPARED} cannot be read: {error}.") from error
