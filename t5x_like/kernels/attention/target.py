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

_named: contextvars.ContextVar[Chip | None] = contextvars.ContextVar("target chip", default=None)


@contextlib.contextmanager
def compiling_for(chip: Chip) -> Iterator[None]:
    """Functions traced inside are meant for `chip`, whatever this machine has."""
    token = _named.set(chip)
    try:
        yield
    finally:
        _named.reset(token)


def target_chip() -> str:
    """A `Chip`, or, of a TPU too new to be known here, its device kind."""
    if (named := _named.get()) is not None:
        return named
    platform = jax.default_backend()
    if platform != "tpu":
        return "cpu" if platform == "cpu" else "gpu"
    kind = jax.devices()[0].device_kind
    return _KINDS.get(kind, kind)
