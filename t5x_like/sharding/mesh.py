"""The device mesh: six named axes over all devices."""

import math

import jax
from jax.sharding import AxisType, Mesh

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.sharding.context import ContextConfig

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
    """

    data: int = -1
    fsdp: int = 1
    stage: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    context: ContextConfig = ContextConfig()

    def __post_init__(self):
        sizes = self.sizes
        bad = [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
        if bad:
            raise UserError(f"MeshConfig has {', '.join(bad)}: sizes are at least 1, or -1 for all devices left.")
        if list(sizes.values()).count(-1) > 1:
            free = ", ".join(axis for axis, size in sizes.items() if size == -1)
            raise UserError(f"MeshConfig has -1 for {free}: at most one axis may take the devices left.")
        if self.stage != 1:
            raise UserError(f"MeshConfig.stage is {self.stage}: only the other axes can be above 1 for now.")

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
                f"The mesh {given} does not fill {num_devices} devices: the sizes must multiply to {num_devices}, "
                "or one of them be -1 (--num_cpu_devices=N makes N virtual devices on a CPU)."
            )
        return {axis: left if size == -1 else size for axis, size in sizes.items()}


def build_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), every axis automatic: XLA propagates shardings from constraints."""
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def describe_mesh(mesh: Mesh) -> str:
    """E.g. `data=2 x tensor=4 (8 cpu devices)`."""
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{axes or 'one device'} ({mesh.size} {kind} device{'s' if mesh.size > 1 else ''})"
