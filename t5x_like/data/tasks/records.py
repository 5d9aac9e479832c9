"""Where the examples of a task come from: records (named values, as JSON has them) of training and of validation."""

import abc
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.extras import require
from t5x_like.data.sources import find_files, name_files
from t5x_like.errors import UserError

Record = dict[str, Any]
SplitName = Literal["train", "validation"]


class Records(abc.ABC):
    """What every kind of records can do; `train` and `validation` say where each split is.

    `validation` is None for records that have no such split: then some of `train` validate.
    """

    train: str | tuple[str, ...]
    validation: str | tuple[str, ...] | None

    @abc.abstractmethod
    def read(self, split: SplitName) -> Iterator[Record]:
        """The records of a split, in the same order at every call; UserError where they cannot be read."""

    @abc.abstractmethod
    def cache_key(self) -> str:
        """Names the present state of the records."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A short name, for logs."""


@configurable
class JsonRecords(Records):
    """Files of JSON: `.jsonl` has an object on each line, any other file a list of objects; both may be `.gz`.

    Attributes:
      train: Paths or globs; one string, or several.
      validation: The same of the validation split; None: some of `train` validate.
    """

    train: str | tuple[str, ...]
    validation: str | tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return Path(self.train if isinstance(self.train, str) else self.train[0]).name

    def _paths(self, split: SplitName) -> list[str]:
        return find_files(getattr(self, split), f"JsonRecords.{split}")

    def cache_key(self) -> str:
        splits = ("train",) if self.validation is None else ("train", "validation")
        return repr((self, [name_files(self._paths(split)) for split in splits]))

    def read(self, split: SplitName) -> Iterator[Record]:
        for path in self._paths(split):
            try:
                for place, record in _json_objects(path):
                    if not isinstance(record, dict):
                        raise UserError(f"{place} is {type(record).__name__}, not an object with named values.")
                    yield record
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"Cannot read {path}: {error}.") from error


def _json_objects(path: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, value)."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        if not path.removesuffix(".gz").endswith(".jsonl"):
            values = _parse(file.read(), path)
            if not isinstance(values, list):
                raise UserError(f"{path} holds no list of objects: name it .jsonl if it has one on each line.")
            yield from ((f"{path}, object {number}", value) for number, value in enumerate(values, start=1))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # Neither JSON nor UTF-8, or nested a thousand times.
        raise UserError(f"{place} is not JSON: {error}.") from error


@configurable
class HuggingFaceRecords(Records):
    """A dataset that Hugging Face's `datasets` reads: a directory of Parquet files, a saved dataset, or one by name.

    Attributes:
      path: A directory, or a name on the hub, e.g. `nyu-mll/glue`; what a name stands for is taken to stay the same.
      subset: Of a dataset that has several, e.g. `mnli`.
      train: Name of the training split.
      validation: Name of the validation split; None: some of `train` validate.
      revision: Of a dataset by name: a commit or tag.
    """

    path: str
    subset: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    revision: str | None = None

    @property
    def name(self) -> str:
        return "/".join(filter(None, (Path(self.path).name, self.subset)))

    def cache_key(self) -> str:
        files = sorted(str(path) for path in Path(self.path).expanduser().rglob("*") if path.is_file())
        return repr((self, name_files(files)))

    def read(self, split: SplitName) -> Iterator[Record]:
        datasets = require("datasets", "HuggingFaceRecords", "tasks")
        path = Path(self.path).expanduser()
        try:
            if (path / "dataset_dict.json").exists():
                dataset = datasets.load_from_disk(str(path))[getattr(self, split)]
            else:
                place = str(path) if path.is_dir() else self.path
                options = {"revision": self.revision, "streaming": True}
                dataset = datasets.load_dataset(place, self.subset, split=getattr(self, split), **options)
            yield from dataset
        except (OSError, ValueError, LookupError, ConnectionError) as error:
            raise UserError(f"HuggingFaceRecords.path={self.path!r}: cannot read {split}: {error}.") from error


@configurable
class TfdsRecords(Records):
    """A dataset of TensorFlow Datasets, by name; TensorFlow is not imported.

    It must have been prepared in the format `array_record`, which `tfds build --file_format=array_record NAME` does, on
    any machine with TensorFlow.

    Attributes:
      dataset: Name, with the configuration and version if need be: `glue/mnli`, `glue/mnli:2.0.0`.
      data_dir: Where it lies; None: TFDS's own default.
      train: Name of the training split; TFDS's slices are understood: `train[:90%]`.
      validation: Name of the validation split; None: some of `train` validate.
    """

    dataset: str
    data_dir: str | None = None
    train: str = "train"
    validation: str | None = "validation"

    @property
    def name(self) -> str:
        return self.dataset

    def cache_key(self) -> str:
        return repr((self, str(self._builder().info.full_name)))

    def _builder(self) -> Any:
        tfds = require("tensorflow_datasets", "TfdsRecords", "tfds")
        directory = self.data_dir and str(Path(self.data_dir).expanduser())
        try:
            return tfds.builder(self.dataset, data_dir=directory, try_gcs=False, file_format="array_record")
        except (tfds.core.DatasetNotFoundError, ValueError, OSError) as error:
            raise UserError(f"TfdsRecords.dataset={self.dataset!r} (data_dir={directory}): {error}.") from error

    def read(self, split: SplitName) -> Iterator[Record]:
        builder = self._builder()
        try:
            source = builder.as_data_source(split=getattr(self, split))
        except (ValueError, OSError, NotImplementedError, AssertionError) as error:
            raise UserError(
                f"TfdsRecords.dataset={self.dataset!r}: its split {getattr(self, split)!r} cannot be read ({error}). "
                f"Prepare it: tfds build --file_format=array_record {self.dataset}"
            ) from error
        for number in range(len(source)):
            yield plain(source[number])


def plain(value: Any) -> Any:
    """Arrays as lists, NumPy's numbers as Python's, bytes as text."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return value.decode(errors="replace") if isinstance(value, bytes) else value
