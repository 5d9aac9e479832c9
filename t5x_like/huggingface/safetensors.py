"""Safetensors files: tensors by name, read one at a time and written in a stream.

A file is the length of its header (8 bytes, little-endian), the header in JSON (dtype, shape and place of every
tensor), and the tensors' bytes. A model in several files has an index that names the file of each tensor.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from t5x_like.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jnp.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    """Where a tensor stands.

    Attributes:
      path: its file.
      dtype: one of DTYPES.
      shape: its size.
      offset: of its first byte in the file.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor, mapped from its file: a page is read when it is touched."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a model's directory by name: of the files its index names, else of all `.safetensors` files.

    Raises:
      UserError: if there is no file, or one is missing, truncated, damaged, or of a dtype that is no floating point.
    """
    index = directory / INDEX
    if not index.exists():
        single = directory / "model.safetensors"
        paths = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"{directory} holds no .safetensors file: save the model with transformers' save_pretrained first."
            )
        return {name: tensor for path in paths for name, tensor in _read_header(path).items()}
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files.values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged, no `weight_map` can be read: {error}.") from error
    outside = [str(file) for file in files.values() if Path(str(file)).name != file]
    if outside:
        raise UserError(f"{index} names {outside[0]}, which is no file of its own directory: copy the files again.")
    headers = {file: _read_header(directory / file) for file in sorted(set(files.values()))}
    absent = [name for name, file in files.items() if name not in headers[file]]
    if absent:
        raise UserError(
            f"{index} names {absent[0]} in {files[absent[0]]}, which does not hold it: copy the files again."
        )
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # The format's own bound; what is no safetensors file can begin with any number.
            entries: dict[str, Any] = json.loads(file.read(length)) if length <= 10**8 else None
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, although the index names it: copy the files again.") from error
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is truncated or is no safetensors file: copy it again.") from error
    for name, tensor in tensors.items():
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        if end > size:
            raise UserError(f"{path} is truncated: {name} ends at byte {end:,} of {size:,}. Copy the file again.")
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} is {entry['dtype']}: only weights of {', '.join(DTYPES)} can be converted.")
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has a size or a place that is no number")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes")
    return StoredTensor(path, dtype, shape, start + begin)


class Tensor(NamedTuple):
    """A tensor to be written; `value` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(directory: Path, tensors: Iterable[Tensor], max_file_bytes: int) -> list[str]:
    """Writes `model.safetensors`, or several files with an index; one tensor is in memory at a time.

    Args:
      directory: exists.
      tensors: in the order of the files.
      max_file_bytes: bound of a file; only a single tensor may exceed it.

    Returns:
      The names of the files with tensors.
    """
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.num_bytes for t in groups[-1]) + tensor.num_bytes > max_file_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        _write_file(directory / "model.safetensors", groups[0])
        return ["model.safetensors"]
    files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for file, group in zip(files, groups, strict=True):
        _write_file(directory / file, group)
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for group in groups for tensor in group)},
        "weight_map": {tensor.name: file for file, group in zip(files, groups, strict=True) for tensor in group},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    # transformers refuses files without this note.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype, _ in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # The data begins at a multiple of 8.
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.value())
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype), tensor
            file.write(value.view(np.uint8).data)
