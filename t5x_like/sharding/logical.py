"""What a traced function asks of the placement around it, and batches on their way to the devices."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from t5x_like.sharding.placement import RULES, current, partition_spec


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
    """Asks XLA to lay `x` out by its logical axes on the mesh in context (see `Placement`); None keeps a dim whole.

    Without a mesh it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    placement = current()
    rules = placement.activation_rules if "embed" in axes else placement.rules
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, automatic_axes(), rules))


def length_shards() -> int:
    """Devices that share the length of a row, on the mesh in context."""
    return automatic_axes().get("sequence", 1)


def length_is_split() -> bool:
    """Whether activations may be split over the length on the mesh in context."""
    return length_shards() > 1 or (current().split_activations and automatic_axes().get("tensor", 1) > 1)


def batch_axes() -> tuple[str, ...]:
    """Axes of the mesh in context that split the batch; empty on one device."""
    sizes = automatic_axes()
    return tuple(axis for axis in dict(RULES)["batch"] if sizes.get(axis, 1) > 1)


def vocabulary_axis(vocab_size: int) -> str | None:
    """The axis of the mesh in context that splits the vocabulary, if it does."""
    return partition_spec(("vocab",), (vocab_size,), automatic_axes())[0]
