"""Chips and how they are wired: what a plan is made for."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from t5x_like.errors import UserError
from t5x_like.training.flops import PEAK_FLOPS

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator; all numbers are of one JAX device (a v7x chip shows as two).

    Attributes:
      kind: `device_kind` in JAX.
      memory: bytes that a program may use; of TPUs, what their compiler allows.
      memory_bandwidth: bytes per second of it.
      link_bandwidth: bytes per second that a device sends to a neighbour within its group (along one axis of a TPU's
        torus, in one direction; over NVLink).
      network_bandwidth: bytes per second between groups (slices of TPUs, nodes of GPUs).
      clock: cycles per second that the compiler's estimates are in; None where no compiler gives any.
      dims: of the torus; 0 for GPUs.
      devices: JAX devices per chip.
    """

    kind: str
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    clock: float | None = None
    dims: int = 0
    devices: int = 1

    @property
    def platform(self) -> Literal["tpu", "gpu", "cpu"]:
        if self.kind == "cpu":
            return "cpu"
        return "tpu" if self.dims else "gpu"

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS.get(self.kind)


# Memory: what libtpu 0.0.42 allows a program. Bandwidths: Google Cloud documentation and "How to Scale Your Model"
# (Austin et al. 2025, chapter 2); NVIDIA data sheets, with one 400 Gbit/s adapter per GPU (800 for B200, 200 for A100).
# Clocks of v4, v5e and v5p follow from their peak and the size of their matrix units. Those of v6e and v7x are set so
# that the compiler's cycles for a product of 8192 x 8192 matrices mean 0.9 of the peak, as they do on the other three.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", int(30.75 * GiB), 1.23e12, 45e9, 6.25e9, 1.05e9, dims=3),
    "v5e": Chip("TPU v5e", int(15.75 * GiB), 0.82e12, 45e9, 3.125e9, 1.5e9, dims=2),
    "v5p": Chip("TPU v5p", int(95.74 * GiB), 2.77e12, 90e9, 6.25e9, 1.75e9, dims=3),
    "v6e": Chip("TPU v6e", int(31.25 * GiB), 1.64e12, 90e9, 12.5e9, 2.24e9, dims=2),
    "v7x": Chip("TPU7x", int(94.75 * GiB), 3.7e12, 90e9, 6.25e9, 2.46e9, dims=3, devices=2),
    "a100": Chip("NVIDIA A100-SXM4-80GB", 80 * 10**9, 2.04e12, 300e9, 25e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", 80 * 10**9, 3.35e12, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 4.8e12, 450e9, 50e9),
    "b200": Chip("NVIDIA B200", 180 * 10**9, 8e12, 900e9, 100e9),
    "cpu": Chip("cpu", 0, 0, 0, 0),
}

# JAX has two spellings for some.
KINDS = {chip.kind: name for name, chip in CHIPS.items()} | {
    "TPU v5": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v6 lite": "v6e",
}
"""Chips by the kind of their devices."""

SHAPES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
    0: ("1", "8", "8x2", "8x16", "8x128"),
}
"""Shapes that are offered, by the number of dims of the torus; for GPUs: GPUs per node x nodes."""


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs (or several, joined by the data centre's network), nodes of GPUs, or virtual CPU devices.

    Attributes:
      name: as the user wrote it, e.g. `v5p:4x4x4`.
      chip_name: key in CHIPS.
      shape: chips along each dim of one slice; for GPUs (per node, nodes).
      num_slices: equal slices.
    """

    name: str
    chip_name: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def devices_per_group(self) -> int:
        """Devices joined by fast links: a slice, a node."""
        if self.chip.platform == "gpu":
            return self.shape[0]
        return math.prod(self.shape) * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which dims the torus is closed: all if a slice is made of 4x4x4 cubes; 16 of v5e and v6e."""
        if self.chip.dims == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)

    def describe(self) -> str:
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        chips = f"{self.num_chips:,} chip{'s' if self.num_chips > 1 else ''}"
        return f"{slices}{self.name} ({chips}, {self.num_devices:,} JAX devices)"


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """`v5p:4x4x4`, `v6e:16x16`, `h100:8x16` (GPUs per node x nodes), `cpu:8`.

    Raises:
      UserError: if there is no such chip or shape; lists those known.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name.lower())
    chip_name = match[1].replace("tpu7x", "v7x") if match else ""
    if chip_name not in CHIPS:
        raise UserError(f"--topology={name}: there is no such topology. Known are:\n{known_topologies()}")
    chip, shape = CHIPS[chip_name], tuple(map(int, match[2].split("x")))
    if num_slices < 1 or (num_slices > 1 and chip.platform != "tpu"):
        raise UserError(f"--num_slices={num_slices}: only TPUs come in slices, 1 or more; GPUs as {chip_name}:8xNODES.")
    if not _is_offered(chip, shape):
        raise UserError(f"--topology={name}: {chip_name} has no such shape. Known are:\n{known_topologies(chip_name)}")
    if chip.platform == "gpu" and len(shape) == 1:
        shape = (*shape, 1)
    return Topology(name, chip_name, shape, num_slices)


def _is_offered(chip: Chip, shape: tuple[int, ...]) -> bool:
    if min(shape) < 1 or math.prod(shape) > 16384:
        return False
    if chip.platform == "cpu":
        return len(shape) == 1
    if chip.platform == "gpu":
        return len(shape) <= 2 and shape[0] <= 8
    cubes = len(shape) == 3 and all(size % 4 == 0 for size in shape)
    return "x".join(map(str, shape)) in SHAPES[chip.dims] or (chip.dims == 3 and cubes)


def known_topologies(chip_name: str | None = None) -> str:
    """A line for each chip (or one of them): its shapes with their numbers of chips."""
    lines = []
    for name, chip in CHIPS.items():
        if chip_name not in (None, name) or chip.platform == "cpu":
            continue
        shapes = ", ".join(f"{name}:{shape} ({math.prod(map(int, shape.split('x')))})" for shape in SHAPES[chip.dims])
        more = {3: "; or any of 4x4x4 cubes", 2: "", 0: "; GPUs per node x nodes"}[chip.dims]
        lines.append(f"  {shapes}{more}")
    return "\n".join(lines if chip_name != "cpu" else ["  cpu:N (N virtual devices)"])


def slice_shapes(chip_name: str) -> list[Topology]:
    """All offered shapes of a chip, the smallest first."""
    return [parse_topology(f"{chip_name}:{shape}") for shape in SHAPES[CHIPS[chip_name].dims]]
