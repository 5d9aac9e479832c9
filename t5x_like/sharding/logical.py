"""From logical names of dims to axes of the mesh."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp", "expert")),
    ("length", ("sequence",)),
    ("layers", ("stage",)),
    ("expert", ("expert",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("embed", ("fsdp",)),
    ("latent", ("fsdp",)),
)
"""In order of priority: a rule applies where its mesh axes are still free in the array and divide the dim.

Names without a rule (head_dim, norm, position, router) stay whole. Activations and parameters share the table: in
("batch", "length", "embed") the batch has taken `fsdp` before "embed" asks for it.
"""


SPLIT_ACTIVATIONS = (*(rule for rule in RULES if rule[0] != "length"), ("length", ("sequence", "tensor")))
"""The rules with `MeshConfig.split_activations`: where heads and hidden units leave `tensor`, the length takes it."""

split_activations = jax.make_user_context(False)
"""Whether those rules are in force: `with split_activations(True): ...`; read while tracing."""


def partition_spec(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh_shape: Mapping[str, int],
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES,
) -> PartitionSpec:
    """How an array of `shape` with these logical axes lies on a mesh with these axis sizes."""
    assert len(axes) == len(shape), (axes, shape)
    entries: list[tuple[str, ...] | str | None] = [None] * len(axes)
    free = {axis for axis, size in mesh_shape.items() if size > 1}
    for name, mesh_axes in rules:
        usable = tuple(axis for axis in mesh_axes if axis in free)
        if not usable or name not in axes:
            continue
        dim = axes.index(name)
        if shape[dim] % math.prod(mesh_shape[axis] for axis in usable) == 0:
            entries[dim] = usable if len(usable) > 1 else usable[0]
            free -= set(usable)
    return PartitionSpec(*entries)


def is_axes(node: Any) -> bool:
    """True for a leaf of a tree of logical axes: a plain tuple of names."""
    return type(node) is tuple and all(isinstance(name, str) for name in node)


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a tree of logical axes and an equal tree of arrays or `ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda names, array: NamedSharding(mesh, partition_spec(names, array.shape, mesh.shape)),
        axes,
        shapes,
        is_leaf=is_axes,
    )


def local_rows(target: dict[str, jax.ShapeDtypeStruct]) -> slice | Int[np.ndarray, "rows"]:
    """The rows of a batch that the devices of this process need, in ascending order."""
    if jax.process_count() == 1:
        return slice(None)
    batch = next(iter(target.values()))
    shares = batch.sharding.addressable_devices_indices_map(batch.shape).values()
    return np.unique(np.concatenate([np.arange(batch.shape[0])[share[0]] for share in shares]))


def on_devices(arrays: dict[str, Any], target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Sends host arrays to the devices, each its share, as the shardings of `target` say.

    Args:
      arrays: the `local_rows` of a batch.
      target: shapes and shardings of the whole batch.
    """
    if jax.process_count() == 1:
        return jax.device_put(arrays, {name: target[name].sharding for name in arrays})
    rows = local_rows(target)

    def place(array: np.ndarray, whole: jax.ShapeDtypeStruct) -> Array:
        # Rows of this process need not be neighbours in the batch: where two processes share a row, or slices meet.
        share = lambda index: array[np.searchsorted(rows, np.arange(whole.shape[0])[index[0]])][:, *index[1:]]
        return jax.make_array_from_callback(whole.shape, whole.sharding, share)

    return {name: place(array, target[name]) for name, array in arrays.items()}


def automatic_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in context that XLA handles here: not those of a `shard_map` around this."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else {axis: mesh.shape[axis] for axis in mesh.axis_names if axis not in mesh.manual_axes}


def constrain(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """Asks XLA to lay `x` out by its logical axes on the mesh in context (`jax.set_mesh`); None keeps a dim whole.

    Without a mesh it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    rules = SPLIT_ACTIVATIONS if split_activations.value and "embed" in axes else RULES
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, automatic_axes(), rules))


def length_shards() -> int:
    """Devices that share the length of a row, on the mesh in context."""
    return automatic_axes().get("sequence", 1)


def length_is_split() -> bool:
    """Whether activations may be split over the length on the mesh in context."""
    return length_shards() > 1 or (split_activations.value and automatic_axes().get("tensor", 1) > 1)


def batch_axes() -> tuple[str, ...]:
    """Axes of the mesh in context that split the batch; empty on one device."""
    sizes = automatic_axes()
    return tuple(axis for axis in dict(RULES)["batch"] if sizes.get(axis, 1) > 1)


def vocabulary_axis(vocab_size: int) -> str | None:
    """The axis of the mesh in context that splits the vocabulary, if it does."""
    return partition_spec(("vocab",), (vocab_size,), automatic_axes())[0]
