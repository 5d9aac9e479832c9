"""The device mesh: six named axes over all devices."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.runtime.compiler_options import XlaProfile
from t5x_like.sharding.placement import FIXED, RULES, ContextConfig, Placement, Rules

MESH_AXES = ("data", "fsdp", "stage", "expert", "sequence", "tensor")
"""Outermost first: `tensor`, which communicates most, gets the nearest devices."""


@configurable
class MeshConfig:
    """How many ways each axis of the mesh splits the devices; one axis may be -1: all that is left.

    Attributes:
      data: copies of the model, each on its share of the batch.
      fsdp: shares of the batch among which parameters and optimizer state are sharded too.
      stage: pipeline stages.
      expert: shares of the experts of a mixture of experts; the batch is split over it too.
      sequence: shares of the sequence length.
      tensor: shares of heads, hidden units and vocabulary.
      context: how attention works where `sequence` splits the length.
      split_activations: between the matrix products that `tensor` splits, splits activations over the length instead of
        keeping them whole on all its devices (Korthikanti et al. 2022, section 4.2.2): less memory, the same traffic.
      logical_axis_rules: pairs of a name of dims and the axis, or axes, that split it, or None to keep it whole, e.g.
        `('mlp', 'tensor')`; in order of priority (as in T5X). They replace the rules of parameters, and of activations
        between operations, all but those of batch, length, layers and expert; None: the defaults of docs/meshes.md.
      slice_axis: the axis that crosses from slice to slice where several are joined by a data center's network; all
        others stay within a slice, whose links are faster.
      xla_profile: options of the compiler by name, see docs/meshes.md; None: its defaults.
    """

    data: int = -1
    fsdp: int = 1
    stage: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    context: ContextConfig = ContextConfig()
    split_activations: bool = False
    logical_axis_rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] | None = None
    slice_axis: Literal["data", "fsdp", "stage"] = "data"
    xla_profile: XlaProfile | None = None

    def __post_init__(self):
        sizes = self.sizes
        bad = [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
        if bad:
            raise UserError(f"MeshConfig has {', '.join(bad)}: sizes are at least 1, or -1 for all devices left.")
        if list(sizes.values()).count(-1) > 1:
            free = ", ".join(axis for axis, size in sizes.items() if size == -1)
            raise UserError(f"MeshConfig has -1 for {free}: at most one axis may take the devices left.")
        for name, axes in self.rules:
            if unknown := set(axes) - set(MESH_AXES):
                raise UserError(
                    f"MeshConfig.logical_axis_rules sends {name} to {', '.join(sorted(unknown))}: the axes of the mesh "
                    f"are {', '.join(MESH_AXES)}."
                )
        if fixed := {name for name, _ in self.logical_axis_rules or ()} & set(FIXED):
            raise UserError(
                f"MeshConfig.logical_axis_rules has a rule for {', '.join(sorted(fixed))}: what splits "
                f"{', '.join(FIXED)} is given by the parallelism itself; leave it out."
            )

    @property
    def rules(self) -> Rules:
        """The rules in force: those that nothing replaces, and then the given ones or the others of `RULES`."""
        if self.logical_axis_rules is None:
            return RULES
        as_axes = lambda axes: (axes,) if isinstance(axes, str) else axes or ()
        fixed = tuple(rule for rule in RULES if rule[0] in FIXED)
        return (*fixed, *((name, as_axes(axes)) for name, axes in self.logical_axis_rules))

    def on(self, mesh: Mesh | AbstractMesh) -> Placement:
        """The choices of this configuration on a mesh; see `build_mesh`."""
        return Placement(mesh, self.context, self.split_activations, self.rules)

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def resolve(self, num_devices: int) -> dict[str, int]:
        """Sizes of all axes for that many devices, the -1 filled in.

        Raises:
          UserError: if they do not multiply to `num_devices`.
        """
        sizes = self.sizes
        known = math.prod(size for size in sizes.values() if size != -1)
        left, rest = divmod(num_devices, known)
        if rest or (left != 1 and -1 not in sizes.values()):
            given = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
            raise UserError(
                f"The mesh {given or 'of one device'} does not fill {num_devices} devices: the sizes must multiply to "
                f"{num_devices}{self._nearest(num_devices)}, or one of them be -1 (--num_cpu_devices=N makes N virtual "
                "devices on a CPU)."
            )
        return {axis: left if size == -1 else size for axis, size in sizes.items()}

    def _nearest(self, num_devices: int) -> str:
        """The change of one axis that fills the devices, as an example."""
        sizes = {axis: size for axis, size in self.sizes.items() if size != -1}
        for axis, size in sizes.items():
            others = math.prod(sizes.values()) // size
            if num_devices % others == 0:
                return f" (e.g. {axis}={num_devices // others})"
        return ""


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), every axis automatic: XLA propagates shardings from constraints.

    Axes that communicate most get the nearest neighbours of a slice, and only `slice_axis` leaves it.

    Raises:
      UserError: if the sizes do not fit the devices or their slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[config.slice_axis] % slices:
        nearest = math.gcd(sizes[config.slice_axis] * slices, len(devices))
        raise UserError(
            f"MeshConfig.{config.slice_axis} is {sizes[config.slice_axis]}, which {slices} slices cannot share: use a "
            f"multiple of {slices}, e.g. {nearest}, or another MeshConfig.slice_axis."
        )
    return Mesh(_arranged(sizes, config.slice_axis, slices, devices), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))


def place(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Placement:
    """The mesh over `devices` (default: all), with the choices of `config`; see `build_mesh`."""
    return config.on(build_mesh(config, devices))


def _arranged(sizes: dict[str, int], slice_axis: str, slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in an array with a dim per axis."""
    within = [size // slices if axis == slice_axis else size for axis, size in sizes.items()]
    across = [slices if axis == slice_axis else 1 for axis in sizes]
    build = lambda split: (
        mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=split)
        if slices > 1
        else mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=split)
    )
    try:
        return build(False)
    except NotImplementedError:
        # No axis of the machine, or product of some, has the length of an axis of the mesh: one must be divided.
        return build(True)


def describe_mesh(mesh: Mesh) -> str:
    """E.g. `data=2 x tensor=4 (8 cpu devices)`."""
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    where = f" in {slices} slices" if slices > 1 else ""
    return f"{axes or 'one device'} ({mesh.size} {kind} device{'s' if mesh.size > 1 else ''}{where})"
