"""What of a model lies where: the table that is printed, and what no axis of the mesh splits."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

LARGE_BYTES = 16 * 2**20
"""A parameter from this size on should not be whole on every device of a mesh that splits parameters."""


def bytes_on_device(array: jax.ShapeDtypeStruct) -> int:
    """Bytes that the device with the largest share of an array holds."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def layout_table(params: Any, axes: Any) -> list[str]:
    """A line for every parameter: name, shape, logical axes, how the mesh splits it, and its MiB on a device.

    Args:
      params: tree of `ShapeDtypeStruct` with shardings.
      axes: equal tree of logical axes.
    """
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    rows = [("parameter", "shape", "axes", "partition", "MiB per device")]
    for (path, array), axis_names in zip(jax.tree.leaves_with_path(params), names, strict=True):
        spec = ", ".join(_entry(entry) for entry in array.sharding.spec)
        shape = " x ".join(map(str, array.shape))
        rows.append((_name(path), shape, ", ".join(axis_names), spec, f"{bytes_on_device(array) / 2**20:,.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    padded = ([f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)] for row in rows)
    return ["  ".join([*cells, f"{row[4]:>14}"]) for cells, row in zip(padded, rows, strict=True)]


def left_whole(params: Any, mesh: Mesh, least_bytes: int = LARGE_BYTES) -> list[str]:
    """Names and sizes of large parameters that are whole on every device, though the mesh splits parameters.

    Args:
      params: tree of `ShapeDtypeStruct` with shardings.
      mesh: where they are.
      least_bytes: smaller ones do not count.
    """
    if all(mesh.shape[axis] == 1 for axis in ("fsdp", "stage", "expert", "tensor")):
        return []
    return [
        f"{_name(path)} ({' x '.join(map(str, array.shape))}, {bytes_on_device(array) / 2**20:,.0f} MiB)"
        for path, array in jax.tree.leaves_with_path(params)
        if bytes_on_device(array) == array.size * array.dtype.itemsize >= least_bytes
    ]


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)


def _entry(entry: Any) -> str:
    return "-" if entry is None else " x ".join((entry,) if isinstance(entry, str) else entry)
