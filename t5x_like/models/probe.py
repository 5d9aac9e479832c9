"""A look at activations layer by layer, for debugging; a model that is traced without a probe holds nothing of it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PARTS = ("mixer", "cross_attention", "feedforward", "output")
"""Where a layer is looked at, in the order of computation: what its parts add to the stream, and the stream behind."""

Look = Callable[[str, str, Array, Array], None]
"""Takes a stack (`decoder` where it attends to an encoder, else `stack`), a part, the layer's number, and the root mean
square of an activation; on the host, in any order."""

_LOOK: contextvars.ContextVar[Look | None] = contextvars.ContextVar("look", default=None)
_LAYER: contextvars.ContextVar[tuple[str, Array] | None] = contextvars.ContextVar("layer", default=None)


@contextlib.contextmanager
def looking(look: Look) -> Iterator[None]:
    """What is traced within shows `look` its activations whenever it runs."""
    token = _LOOK.set(look)
    try:
        yield
    finally:
        _LOOK.reset(token)


@contextlib.contextmanager
def in_layer(stack: str, number: Int[Array, ""]) -> Iterator[None]:
    """What is traced within belongs to a layer."""
    token = _LAYER.set((stack, number))
    try:
        yield
    finally:
        _LAYER.reset(token)


def seen(part: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, shown to the probe, if there is one."""
    look, layer = _LOOK.get(), _LAYER.get()
    if look is not None and layer is not None:
        stack, number = layer
        # Divided by the largest first: squares must not overflow where the values do not.
        values = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(values))
        size = largest * jnp.sqrt(jnp.mean(jnp.square(values / jnp.where(largest == 0, 1, largest))))
        jax.debug.callback(lambda number, size: look(stack, part, number, size), number, size)
    return x
