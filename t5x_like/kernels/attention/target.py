"""What a program is compiled for: the accelerator at hand, or one that is named in order to plan for it."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax

Chip = Literal["cpu", "gpu", "v4", "v5e", "v5p", "v6e", "v7x"]

_KINDS: dict[str, Chip] = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}
"""Device kinds as JAX spells them."""

_named: contextvars.ContextVar[tuple[Chip, int] | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(chip: Chip, num_devices: int = 1) -> Iterator[None]:
    """Functions traced inside are meant for so many of `chip`, whatever this machine has."""
    token = _named.set((chip, num_devices))
    try:
        yield
    finally:
        _named.reset(token)


def target_chip() -> str:
    """A `Chip`, or, of a TPU too new to be known here, its device kind."""
    if (named := _named.get()) is not None:
        return named[0]
    platform = jax.default_backend()
    if platform != "tpu":
        return "cpu" if platform == "cpu" else "gpu"
    kind = jax.devices()[0].device_kind
    return _KINDS.get(kind, kind)


def split_by_compiler() -> bool:
    """Whether the compiler spreads the program over devices: not on a single one, and not inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        named = _named.get()
        return (jax.device_count() if named is None else named[1]) > 1
    return any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
