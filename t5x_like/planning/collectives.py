"""Collectives of a compiled program: what they move, along which axes of the mesh, and how long that takes."""

import math
import re
from dataclasses import dataclass

import numpy as np

from t5x_like.planning.hlo import Instruction, shape_bytes
from t5x_like.planning.topology import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
HOP_SECONDS = 1e-6
"""Latency of one step of a ring."""


@dataclass(frozen=True)
class Network:
    """Where the devices of a mesh are.

    Attributes:
      topology: the slices.
      axes: names of the mesh's axes.
      sizes: of the axes.
      coords: position in the torus of each device in the mesh's order, and the number of its slice (GPUs: of its node)
        last, [devices, dims + 1].
    """

    topology: Topology
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    coords: np.ndarray

    def axes_of(self, group: np.ndarray) -> str:
        """The axes along which the devices of a group differ: `fsdp`, `data+fsdp`; `-` for a single device."""
        places = np.array(np.unravel_index(group, self.sizes))
        return "+".join(a for a, row in zip(self.axes, places, strict=True) if np.ptp(row) > 0) or "-"

    def seconds(self, kind: str, size: int, group: np.ndarray) -> float:
        """Lower bound of the time of a collective among `group`, from the bandwidth of the links that it can use.

        Args:
          kind: one of KINDS.
          size: bytes per device: of the whole array for gathers, reductions and scatters; of what a device sends for
            all-to-all and permutes.
          group: positions of the devices in the mesh.
        """
        if len(group) < 2:
            return 0.0
        places = self.coords[group]
        groups = len(np.unique(places[:, -1]))
        near = len(group) // groups
        inside = self._within(kind, size, places[places[:, -1] == places[0, -1]]) if near > 1 else 0.0
        if groups == 1:
            return inside
        # Devices share the traffic between groups: each sends its part of what its own group holds together.
        share = size / near if kind in ("all-gather", "all-reduce", "reduce-scatter") else size
        return inside + _passes(kind) * share * (groups - 1) / groups / self.topology.chip.network_bandwidth

    def _within(self, kind: str, size: int, places: np.ndarray) -> float:
        chip, n = self.topology.chip, len(places)
        if chip.dims == 0:
            return _passes(kind) * size * (n - 1) / n / chip.link_bandwidth + HOP_SECONDS
        extents = [len(np.unique(places[:, dim])) for dim in range(chip.dims)]
        if math.prod(extents) == 1:  # the two devices of one chip
            return _passes(kind) * size * (n - 1) / n / (6 * chip.link_bandwidth)
        closed = [
            wrap and extent == whole
            for wrap, extent, whole in zip(self.topology.wrap, extents, self.topology.shape, strict=True)
        ]
        hops = sum(extent - 1 for extent in extents)
        if kind == "collective-permute":
            return size / chip.link_bandwidth + HOP_SECONDS
        if "all-to-all" in kind:
            # Half of the data crosses the middle of the longest dim, over one link, or two where it is closed.
            longest = max(range(chip.dims), key=lambda dim: extents[dim] / (1 + closed[dim]))
            return size * extents[longest] / 4 / (chip.link_bandwidth * (1 + closed[longest])) + HOP_SECONDS * hops
        links = sum(1 + wraps for extent, wraps in zip(extents, closed, strict=True) if extent > 1)
        passes = _passes(kind)
        return passes * size * (n - 1) / n / (links * chip.link_bandwidth) + passes * HOP_SECONDS * hops


def _passes(kind: str) -> int:
    """An all-reduce is a reduce-scatter and an all-gather."""
    return 2 if kind == "all-reduce" else 1


def kind_of(instruction: Instruction) -> str | None:
    """The kind of a collective, also of its asynchronous start; None for anything else."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def bytes_of(instruction: Instruction) -> int:
    """Bytes per device as `Network.seconds` wants them."""
    kind = kind_of(instruction)
    if not instruction.opcode.endswith("-start") or kind == "all-reduce":
        size = instruction.bytes
        return size * len(first_group(instruction, 0)) if kind == "reduce-scatter" else size
    # The result of any other start holds its operands, then its results.
    return max(shape_bytes(part) for part in _parts(instruction.shape)[:2])


def _parts(shape: str) -> list[str]:
    """`((a, b), c)` -> `(a, b)`, `c`."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for index, letter in enumerate(shape):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[start:index].strip())
            start = index + 1
    return parts


def first_group(instruction: Instruction, num_devices: int) -> np.ndarray:
    """Positions in the mesh of the devices of one group of a collective.

    XLA writes groups as lists, as a reshaped and transposed range, or by axes of a mesh of its own.
    """
    text = instruction.rest
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        moves = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return np.array(next((pair for pair in moves if pair[0] != pair[1]), moves[0]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array([int(device) for device in listed[1].split(",")])
    if rows := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _range(rows[3]).reshape(int(rows[1]), int(rows[2]))[0]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text):
        return _mesh_group(mesh[1], mesh[2], mesh[3])
    return np.arange(num_devices)


def _range(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers 0 to 7 as 2 x 4, transposed, flattened."""
    shape, _, order = text.partition("T")
    sizes = [int(size) for size in shape.strip("[]").split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose([int(dim) for dim in order.strip("()").split(",")]) if order else numbers).reshape(-1)


def _mesh_group(axes: str, devices: str | None, grouped: str) -> np.ndarray:
    """The first group along the axes of a mesh, or parts of them: `'axis_1':(2)4` is 4 steps of 2 within the axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values())) if devices is None else _range(devices)
    numbers = numbers.reshape(tuple(sizes.values()))
    parts = {name: (pre, size) for name, pre, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", grouped)}
    index = []
    for name, size in sizes.items():
        if name not in parts:
            index.append([0])
        elif parts[name][0]:
            before, count = int(parts[name][0]), int(parts[name][1])
            step = size // (before * count)
            index.append([i * step for i in range(count)])
        else:
            index.append(list(range(size)))
    return numbers[np.ix_(*index)].reshape(-1)
