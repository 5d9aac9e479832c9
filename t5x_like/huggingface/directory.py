"""Models in Hugging Face directories: read into our parameters, and written from them.

No value changes on the way: tensors are transposed, reshaped, split, fused and stacked, and keep every bit. Only one
tensor at a time is in the host's memory.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from t5x_like.configurable import active
from t5x_like.errors import UserError
from t5x_like.huggingface.families import FAMILIES
from t5x_like.huggingface.families.family import Family, Fields
from t5x_like.huggingface.name_map import Entry, bind
from t5x_like.huggingface.safetensors import StoredTensor, Tensor, open_tensors, write_tensors
from t5x_like.models.block import BlockConfig
from t5x_like.models.model_spec import ModelSpec
from t5x_like.models.parameters import Params
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.placement import Placement

CONFIG = "config.json"
DEFAULT_LENGTH = 512
"""Tokens of the longest text where config.json names none: T5 was trained on such."""


class Source(NamedTuple):
    """What `config.json` says.

    Attributes:
      family: of the model.
      config: of the model, its vocabulary without padding.
      max_length: tokens of the longest text it is meant for.
    """

    family: Family
    config: ModelConfig
    max_length: int


def read_config(directory: Path) -> Source:
    """Reads a directory's config.json.

    Raises:
      UserError: if the family, a field or the value of a field is not supported.
    """
    fields = Fields.of_file(directory / CONFIG)
    family = FAMILIES.get(fields.values.get("model_type"))
    if family is None:
        raise fields.unsupported("model_type", f"known are {', '.join(FAMILIES)}")
    if fields.take("quantization_config") is not None:
        raise UserError(
            f"{fields.path} has quantization_config: quantised weights cannot be converted. Load the model with "
            "transformers in bfloat16, and save it again with save_pretrained."
        )
    try:
        config = family.read(fields)
    except UserError as error:
        if str(error).startswith(str(fields.path)):
            raise
        raise UserError(f"{fields.path} describes no possible model: {error}") from error
    fields.check_all_taken(family.inert)
    dtype = fields.values.get("dtype") or fields.values.get("torch_dtype") or "float32"
    lengths = (fields.values.get(name) for name in ("max_position_embeddings", "n_positions"))
    return Source(
        family,
        dataclasses.replace(config, dtype="float32" if dtype == "float32" else "bfloat16"),
        next(filter(None, lengths), DEFAULT_LENGTH),
    )


def import_params(
    directory: Path,
    family: Family,
    config: ModelConfig,
    spec: ModelSpec,
    *,
    vocab_size: int,
    placement: Placement,
) -> tuple[Params, str]:
    """Reads the weights of a Hugging Face directory, tensor by tensor, onto the mesh.

    Args:
      directory: with .safetensors files.
      family: the model's.
      config: of the model.
      spec: its parameters.
      vocab_size: tokens in the files; where `config.vocab_size` is larger, the rows added are the mean of the others,
        so that they change log-probabilities by at most log(1 + added / vocab_size).
      placement: where the parameters will be.

    Returns:
      float32 parameters, and the name of the files' dtype (float32 if they mix several).

    Raises:
      UserError: if tensors are missing, left over, of the wrong shape, or cannot be read.
    """
    tensors = _canonical_names(open_tensors(directory), family)
    entries = bind(family.rules, config, spec.params, vocab_size)
    _drop_copies(directory, tensors, family, {entry.name for entry in entries})
    _check_tensors(directory, tensors, entries)
    places = traverse_util.flatten_dict(placement.shardings(spec.axes, spec.params))
    flat_shapes = traverse_util.flatten_dict(spec.params)
    params: dict[tuple[str, ...], Array] = {}
    for entry in entries:
        stored = tensors[entry.name].read()
        for part in entry.parts:
            # A copy, so that no array depends on the file.
            value = np.array(entry.part_of(stored, part), np.float32, order="C")
            shape, sharding = flat_shapes[part.path].shape, places[part.path]
            if not part.index:
                params[part.path] = jax.device_put(_padded(value, shape[0]), sharding)
                continue
            if part.path not in params:
                params[part.path] = jnp.zeros(shape, device=sharding)
            piece = jax.device_put(
                value, NamedSharding(placement.mesh, PartitionSpec(*sharding.spec[len(part.index) :]))
            )
            params[part.path] = _set_piece(params[part.path], piece, part.index, sharding)
        # Or else copies to a slow device would queue up in the host's memory.
        jax.block_until_ready([params[part.path] for part in entry.parts])
    dtypes = {tensors[entry.name].dtype.name for entry in entries if not entry.always_float32}
    return traverse_util.unflatten_dict(params), dtypes.pop() if len(dtypes) == 1 else "float32"


@partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _set_piece(stacked: Array, piece: Array, index: tuple[int, ...], sharding: NamedSharding) -> Array:
    """`stacked`, with a layer of it, or an expert of a layer, replaced."""
    piece = piece.reshape((1,) * len(index) + piece.shape)
    updated = lax.dynamic_update_slice(stacked, piece, index + (0,) * (stacked.ndim - len(index)))
    return lax.with_sharding_constraint(updated, sharding)


def _padded(value: Float[np.ndarray, "rows ..."], num_rows: int) -> Float[np.ndarray, "num_rows ..."]:
    added = num_rows - len(value)
    return value if not added else np.concatenate([value, np.repeat(value.mean(0, keepdims=True), added, axis=0)])


def _canonical_names(tensors: dict[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """Without what is ignored, and with the prefix that files of a bare model lack (those of GPT-2, for one)."""
    tensors = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(family.ignored, name)}
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    heads = {rule.theirs.split(".")[0] for rule in family.rules if not rule.theirs.startswith(family.prefix)}
    return {name if name.split(".")[0] in heads else family.prefix + name: tensor for name, tensor in tensors.items()}


def _drop_copies(directory: Path, tensors: dict[str, StoredTensor], family: Family, needed: set[str]) -> None:
    """Drops what some files keep beside the original, such as a tied embedding as the head, if it is the same."""
    for name, original in family.copies.items():
        if name in needed or name not in tensors or original not in tensors:
            continue
        if not np.array_equal(tensors[original].read(), tensors.pop(name).read()):
            raise UserError(
                f"{directory} has {name} that differs from {original}, but config.json ties them: "
                'set "tie_word_embeddings": false there.'
            )


def _check_tensors(directory: Path, tensors: dict[str, StoredTensor], entries: list[Entry]) -> None:
    needed = {entry.name: entry.shape for entry in entries}
    problems = [f"missing: {name} {list(shape)}" for name, shape in needed.items() if name not in tensors]
    problems += [f"left over: {name} {list(tensors[name].shape)}" for name in sorted(set(tensors) - set(needed))]
    problems += [
        f"misshaped: {name} is {list(tensors[name].shape)}, needed is {list(shape)}"
        for name, shape in needed.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError(
            "\n  ".join([f"The tensors in {directory} are not those of its config.json:", *problems[:8], *more])
        )


def choose_family(config: ModelConfig, max_length: int) -> tuple[Family, dict[str, Any]]:
    """The family that can hold a model, and the fields of its config.json.

    A family can, if its config.json reads back as the same model.

    Raises:
      UserError: if none can, with what the nearest would need.
    """
    parts = {type(part) for part in _parts(config)}
    wanted, differences = _architecture(config), {}
    for family in FAMILIES.values():
        if not family.required <= parts <= family.parts:
            continue
        fields = {"model_type": family.model_type, **family.write(config, max_length)}
        try:
            read = family.read(Fields(Path(CONFIG), json.loads(json.dumps(fields))))
        except UserError:  # What is left without the parts that the family lacks is no model.
            continue
        differences[family.model_type] = _differences(wanted, _architecture(read))
        if not differences[family.model_type]:
            return family, {"architectures": [family.architecture], **fields}
    if not differences:
        names = ", ".join(sorted(part.__name__ for part in parts))
        raise UserError(f"No Hugging Face family has models of these parts: {names}.")
    nearest = min(differences, key=lambda name: len(differences[name]))
    lines = differences[nearest]
    more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
    raise UserError(
        f"No Hugging Face family can hold this model; the nearest, {nearest}, would need:\n  "
        + "\n  ".join([*lines[:8], *more])
    )


def _parts(config: ModelConfig) -> Iterator[Any]:
    yield from (config, config.head)
    for stack in config.stacks.values():
        for block in stack.distinct:
            yield from (part for part in (block.mixer, block.feedforward) if part is not None)


def _architecture(config: ModelConfig) -> ModelConfig:
    """What decides the model's parameters and what it computes from them; the rest at its defaults."""
    stacks = {name: _layer_by_layer(stack, config.d_model) for name, stack in config.stacks.items()}
    return active(dataclasses.replace(config, **stacks))


def _layer_by_layer(stack: StackConfig, d_model: int) -> StackConfig:
    """The stack with its layers one by one, or, where they are all equal, as one block; nothing left to be derived."""

    def explicit(block: BlockConfig) -> BlockConfig:
        crossing = block.cross_attention and block.cross_attention.explicit(d_model)
        return active(
            dataclasses.replace(block, mixer=block.mixer and block.mixer.explicit(d_model), cross_attention=crossing)
        )

    blocks = tuple(map(explicit, stack.blocks))
    return dataclasses.replace(stack, block=blocks[0] if len(set(blocks)) == 1 else blocks, first=())


def _differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    if ours == theirs:
        return []
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        items = enumerate(zip(ours, theirs, strict=True))
        return [line for i, (a, b) in items for line in _differences(a, b, f"{path}[{i}]")]
    if type(ours) is not type(theirs) or not dataclasses.is_dataclass(ours):
        return [f"{path}: {theirs!r} (here {ours!r})"]
    names = [field.name for field in dataclasses.fields(ours)]
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in names)
    return [line for name, a, b in pairs for line in _differences(a, b, f"{path}.{name}" if path else name)]


def export_params(
    directory: Path,
    family: Family,
    config: ModelConfig,
    params: Params,
    *,
    vocab_size: int,
    dtype: str,
    max_file_bytes: int,
) -> list[str]:
    """Writes parameters as safetensors files, and returns their names.

    Args:
      directory: exists.
      family: that can hold the model.
      config: of the model.
      params: its parameters, on any mesh.
      vocab_size: rows of embedding and head to write; more are padding.
      dtype: of the files.
      max_file_bytes: bound of a file.
    """
    entries = bind(family.rules, config, params, vocab_size)
    return write_tensors(directory, _exported(entries, params, np.dtype(jnp.dtype(dtype))), max_file_bytes)


def _exported(entries: list[Entry], params: Params, dtype: np.dtype) -> Iterator[Tensor]:
    flat = traverse_util.flatten_dict(params)

    def value(entry: Entry, dtype: np.dtype) -> np.ndarray:
        # Without the rows that pad the vocabulary.
        pieces = (np.asarray(_piece(flat[path], index))[: shape[0]] for path, index, shape, _ in entry.parts)
        return entry.fuse(pieces).astype(dtype, copy=False)

    for entry in entries:
        own = np.dtype("float32") if entry.always_float32 else dtype
        yield Tensor(entry.name, entry.shape, own, partial(value, entry, own))


def _piece(stacked: Array, index: tuple[int, ...]) -> Array:
    """A layer, or an expert of a layer; with no index, all."""
    if not index:
        return stacked
    rest = stacked.shape[len(index) :]
    begin = index + (0,) * len(rest)
    return lax.dynamic_slice(stacked, begin, (1,) * len(index) + rest).reshape(rest)
