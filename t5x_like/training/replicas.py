"""Silent corruption: devices that hold copies of the same parameters must hold the same bits."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

from t5x_like.models.parameters import Params
from t5x_like.training.recovery import Fault

Hashes = UInt32[Array, "devices arrays"]


class ReplicaComparison:
    """Hashes every array's piece on every device that holds it, on the devices, and compares the copies.

    Attributes:
      possible: False if no device holds a copy of what another one holds.
    """

    def __init__(self, params: Params, mesh: Mesh):
        """Takes shapes and shardings of the parameters, or the parameters themselves."""
        leaves = jax.tree.leaves_with_path(params)
        self._names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        self._holders = [_holders(leaf, mesh) for _, leaf in leaves]
        self._devices = list(mesh.devices.flat)
        self._hashes = _hash_on(mesh, [leaf.sharding.spec for _, leaf in leaves])
        self.possible = any(len(devices) > 1 for holders in self._holders for devices in holders)

    def start(self, params: Params) -> Hashes:
        """Dispatches the hashing; nothing waits for it."""
        return self._hashes(jax.tree.leaves(params))

    def differences(self, hashes: Hashes) -> list[str]:
        """Waits for the hashes and names the devices whose copy is another than that of most."""
        values = jax.device_get(hashes)
        found = []
        for column, (name, holders) in enumerate(zip(self._names, self._holders, strict=True)):
            for devices in holders:
                counts = collections.Counter(values[devices, column].tolist())
                usual, times = counts.most_common(1)[0]
                tied = list(counts.values()).count(times) > 1
                odd = [device for device in devices if tied or values[device, column] != usual]
                if len(counts) > 1:
                    found.append(f"{name} on {', '.join(self._named(device) for device in odd)}")
        return found

    def _named(self, number: int) -> str:
        device = self._devices[number]
        return f"{device.device_kind} device {device.id} of process {device.process_index}"


class ReplicaCheck:
    """Compares the copies every so many steps and before every save; does nothing where there are no copies."""

    def __init__(self, params: Params, mesh: Mesh, every_steps: int | None):
        """Takes shapes and shardings of the parameters; `every_steps` None: never."""
        comparison = None if every_steps is None or mesh.size == 1 else ReplicaComparison(params, mesh)
        self._comparison = comparison if comparison is not None and comparison.possible else None
        self._every_steps = every_steps
        self._pending: tuple[int, Hashes] | None = None

    def after_step(self, step: int, params: Params) -> None:
        """Starts the comparison that is due, and fetches the verdict on the step before: devices never wait for it.

        Raises:
          Fault: if devices disagree.
        """
        self._finish()
        if self._comparison is not None and step % self._every_steps == 0:
            self._pending = (step, self._comparison.start(params))

    def check_now(self, step: int, params: Params) -> None:
        """Compares at once, so that no checkpoint holds what devices disagree about.

        Raises:
          Fault: if they do.
        """
        if self._comparison is not None and self._pending is None:
            self._pending = (step, self._comparison.start(params))
        self._finish()

    def _finish(self) -> None:
        if self._pending is None:
            return
        (step, hashes), self._pending = self._pending, None
        if differences := self._comparison.differences(hashes):
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise Fault(step, f"copies of parameters differ: {'; '.join(differences[:3])}{more}")


def _holders(leaf: Any, mesh: Mesh) -> list[list[int]]:
    """The devices, by their place in the mesh, that hold each piece of an array."""
    places = {device: number for number, device in enumerate(mesh.devices.flat)}
    pieces = collections.defaultdict(list)
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        pieces[str(index)].append(places[device])
    return [sorted(devices) for devices in pieces.values()]


def _hash_on(mesh: Mesh, specs: list[PartitionSpec]) -> Callable[[list[Array]], Hashes]:
    def of_one_device(leaves: list[Array]) -> Hashes:
        return jnp.stack([_hash(leaf) for leaf in leaves])[None]

    hashes = jax.shard_map(
        of_one_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(mesh.axis_names), check_vma=False
    )
    # Every process compares, and decides alike.
    return jax.jit(hashes, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _hash(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Sum of all elements' bits, each times an odd number of its own, modulo 2^32: any single change changes it."""
    bits = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32).reshape(-1)
    odd = 2 * (jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)) + 1
    return jnp.sum(bits * odd, dtype=jnp.uint32)
