"""Where the tokens of a run come from; text, for one, from documents that come in the same order at every call."""

import abc
import contextlib
import functools
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from absl import logging

from t5x_like.configurable import configurable
from t5x_like.data.batches import OrderedBatches, ShuffledBatches, TrainBatches
from t5x_like.data.corpus import Corpus, prepare_corpus
from t5x_like.data.layouts import Layout
from t5x_like.data.objectives.objective import Transform
from t5x_like.data.splits import Split, Texts
from t5x_like.data.tokenizers import TokenizerConfig
from t5x_like.errors import UserError

if TYPE_CHECKING:
    from t5x_like.data.tasks.examples import ExampleCorpus
    from t5x_like.data.tasks.task import Task


class Source(abc.ABC):
    """Where the tokens of a run come from: text, a prepared corpus, the examples of a task, or a mixture of these.

    Attributes:
      brings_tokenizer: Whether its tokens are made already, by a tokenizer of its own.
      needs_epochs: Whether its rows are counted by epochs, and cannot be drawn with replacement.
    """

    brings_tokenizer: bool = False
    needs_epochs: bool = False

    @property
    def tasks(self) -> "tuple[Task, ...]":
        """The tasks whose examples these are; none if it is text."""
        return ()

    @property
    def facts(self) -> tuple[Any, ...]:
        """What decides the order of its rows beside the corpora, the seed and the batch size."""
        return ()

    @property
    def name(self) -> str:
        """A short name, for logs."""
        return type(self).__name__

    @property
    def place(self) -> str:
        """Where it lies, for errors."""
        return self.name

    @abc.abstractmethod
    def corpora(
        self, split: Split, tokenizer: TokenizerConfig | None, directory: Path | None
    ) -> "tuple[Corpus | ExampleCorpus, ...]":
        """The tokens, or the examples, of both splits; of a mixture those of each of its sources.

        Args:
          split: What is validation.
          tokenizer: Of text and of tasks; None for what brings its own.
          directory: Where the tokens are kept between starts; None keeps nothing.

        Raises:
          UserError: if the text, the tokenizer or the directory cannot be used.
        """

    def training(self, layouts: Sequence[Layout], transform: Transform, batch_size: int, seed: int) -> TrainBatches:
        """The batches of training from the layouts of the corpora."""
        (layout,) = layouts
        return ShuffledBatches(layout, transform, batch_size, seed)

    def validation(self, layouts: Sequence[Layout], transform: Transform, batch_size: int) -> OrderedBatches:
        """All rows of the layouts once, in order."""
        (layout,) = layouts
        return OrderedBatches(layout, transform, batch_size)


class DocumentSource(Texts, Source):
    """Text: the tokenizer of the run makes its tokens."""

    def corpora(self, split: Split, tokenizer: TokenizerConfig | None, directory: Path | None) -> tuple[Corpus, ...]:
        assert tokenizer is not None, "DataConfig sees to it"
        return (prepare_corpus(self, tokenizer, split, directory),)


@configurable
class TextSource(DocumentSource):
    r"""Text files of the user, read as UTF-8.

    `.jsonl` files hold one JSON object, hence one document, per line; any other file is plain text. Both may be
    compressed (`.gz`). Files are read in the sorted order of their paths, a plain text file at once.

    Attributes:
      files: Paths or globs (`**` descends into directories); one string, or several.
      text_field: The field of a JSON object that holds the text.
      document_separator: What separates the documents of a plain text file, for example `<|endoftext|>` or two
        newlines; None makes each file one document.
      invalid_utf8: `replace` puts U+FFFD where bytes are not UTF-8, and logs how many; `refuse` stops there.
    """

    files: str | tuple[str, ...]
    text_field: str = "text"
    document_separator: str | None = None
    invalid_utf8: Literal["replace", "refuse"] = "replace"

    def __post_init__(self):
        if not self.files:
            raise UserError("TextSource.files is empty: give at least one path or glob.")
        if self.document_separator == "":
            raise UserError(
                "TextSource.document_separator is an empty string: leave it None for one document per file."
            )

    def paths(self) -> list[str]:
        """The files, sorted, each once; UserError for a path or glob without any."""
        return find_files(self.files, "TextSource.files")

    def cache_key(self) -> str:
        return repr((self, name_files(self.paths())))

    def documents(self) -> Iterator[str]:
        """Yields the documents; UserError names the file (and line) that cannot be read, or an empty corpus."""
        num_documents = num_replaced = 0
        for path in self.paths():
            records = self._json_lines(path) if path.removesuffix(".gz").endswith(".jsonl") else self._plain_text(path)
            for text, replaced in records:
                num_replaced += replaced
                if text:
                    num_documents += 1
                    yield text
        if not num_documents:
            raise UserError(f"TextSource.files={self.files!r} holds no text: every file is empty.")
        if num_replaced:
            _warn_once(f"TextSource: {num_replaced} sequences of bytes were not UTF-8 and became U+FFFD.")

    def _plain_text(self, path: str) -> Iterator[tuple[str, int]]:
        with _open(path) as file:
            raw = file.read()
        if b"\0" in raw:
            raise UserError(f"{path} holds NUL bytes: it is not plain text. Convert it to .txt or .jsonl.")
        text, replaced = self._decode(raw, path)
        documents = [text] if self.document_separator is None else text.split(self.document_separator)
        for number, document in enumerate(documents):
            yield document, replaced if number == 0 else 0

    def _json_lines(self, path: str) -> Iterator[tuple[str, int]]:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                place = f"{path}:{number}"
                line, replaced = self._decode(raw, place)
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                except json.JSONDecodeError as error:
                    raise UserError(f"{place} is not JSON: {error}.") from error
                except (KeyError, TypeError, IndexError) as error:
                    raise UserError(f"{place} is not an object with the field {self.text_field!r}.") from error
                if not isinstance(text, str):
                    raise UserError(f"{place}: the field {self.text_field!r} is {type(text).__name__}, not a string.")
                # JSON can spell half a surrogate pair, which no UTF-8 text holds.
                text, escapes = self._decode(text.encode("utf-8", "surrogatepass"), place)
                yield text, replaced + escapes

    def _decode(self, raw: bytes, place: str) -> tuple[str, int]:
        """The text without a byte order mark, and how many replacements it needed."""
        try:
            return raw.decode("utf-8-sig"), 0
        except UnicodeDecodeError as error:
            if self.invalid_utf8 == "refuse":
                raise UserError(
                    f"{place}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; convert the file, or set "
                    "TextSource.invalid_utf8 = 'replace'."
                ) from error
            text = raw.decode("utf-8-sig", "replace")
            return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def find_files(patterns: str | Sequence[str], field: str) -> list[str]:
    """The files of paths or globs, sorted, each once; UserError, which names the field, for one without any."""
    found = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        pattern = os.path.expanduser(pattern)
        # A file whose name looks like a glob is still a file.
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = [path for path in matches if os.path.isfile(path)]
        if not files:
            remedy = f"it is a directory, try {pattern}/*.txt" if os.path.isdir(pattern) else "check the path"
            raise UserError(f"{field}: no file matches {pattern!r} (in {os.getcwd()}): {remedy}.")
        found.update(files)
    return sorted(found)


def name_files(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Names the present state of files, by what the file system says of them."""
    stats = [(os.path.abspath(path), os.stat(path)) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, through gzip for `.gz`; failures to read become a UserError with the path."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read {path}: {error}.") from error


@functools.cache
def _warn_once(message: str):
    # Documents are read several times (split, tokenizer, tokens): one line is enough.
    logging.warning("%s", message)
