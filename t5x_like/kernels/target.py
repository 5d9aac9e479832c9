"""What a program is compiled for: the accelerator at hand, or one that is named in order to plan for it."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax

Chip = Literal["cpu", "gpu", "a100", "h100", "h200", "v4", "v5e", "v5p", "v6e", "v7x"]
"""What there are block sizes for; "gpu" is any other GPU."""

GPUS = ("a100", "h100", "h200", "gpu")
HOPPER = ("h100", "h200")

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


class _Target(NamedTuple):
    chip: Chip
    interpreted: bool


_named: contextvars.ContextVar[_Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(chip: Chip, interpreted: bool = False) -> Iterator[None]:
    """Functions traced inside are meant for `chip`, whatever this machine has.

    `interpreted`: they run on this machine all the same; Pallas interprets the GPU kernels in them. (For the kernels of
    TPUs there is `pltpu.force_tpu_interpret_mode`.)
    """
    token = _named.set(_Target(chip, interpreted))
    try:
        yield
    finally:
        _named.reset(token)


def target_chip() -> str:
    """A `Chip`, or, of a TPU too new to be known here, its device kind."""
    if (named := _named.get()) is not None:
        return named.chip
    platform = jax.default_backend()
    if platform == "cpu":
        return "cpu"
    kind = jax.devices()[0].device_kind
    if platform == "tpu":
        return _KINDS.get(kind, kind)
    return next((chip for chip in GPUS if chip.upper() in kind), "gpu")


def target_platform() -> Literal["cpu", "gpu", "tpu"]:
    chip = target_chip()
    return "gpu" if chip in GPUS else "cpu" if chip == "cpu" else "tpu"


def interpreted() -> bool:
    """Whether GPU kernels are to be interpreted."""
    named = _named.get()
    return named is not None and named.interpreted
