"""Attention on a mesh: every device attends for its rows, heads and tokens, inside one `jax.shard_map`.

So a Pallas kernel, which the compiler cannot split, runs on each device under any mesh.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from t5x_like.errors import UserError
from t5x_like.kernels.attention.attention import attend as attend_here
from t5x_like.kernels.attention.call import AttentionCall, Positions, Start
from t5x_like.kernels.attention.flash import add_sinks
from t5x_like.sharding import context
from t5x_like.sharding.logical import automatic_axes, partition_spec
from t5x_like.sharding.placement import current
from t5x_like.sharding.token_runs import AXIS

_TOKENS = ("batch", "length", "outer_heads", None)
_SIDES = (("batch", "length"), ("batch", "length"))
_DIMS = {
    "q": _TOKENS,
    "k": _TOKENS,
    "v": _TOKENS,
    "positions": _SIDES,
    "segment_ids": _SIDES,
    "table": ("heads", None),
    "alibi_slopes": ("heads",),
    "bias": ("batch", "heads", "length", None),
    "sinks": ("outer_heads",),
}
"""What the dims of each array of a call are, by the names of `Split`."""


def attend(
    call: AttentionCall,
) -> tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"] | None]:
    """`kernels.attention.attention.attend` on the mesh in context.

    Rows, heads and tokens are split as `sharding.logical.RULES` say; key heads that are too few are repeated. An axis
    that does not divide its dim does the same work on all of its devices. Calls with dropout are left to the compiler,
    which makes the random numbers of one device on any mesh.

    Raises:
      UserError: as there; or if the heads are too few for `ContextConfig.method`.
    """
    split = None if call.dropout_rate else _split(call)
    if split is None or split.length is None:
        call = call.replace(positions=_explicit(call))
    if split is None:
        return attend_here(call)
    repeats = split.repeats(call.k.shape[2])
    if repeats > 1:
        call = call.replace(k=jnp.repeat(call.k, repeats, axis=2), v=jnp.repeat(call.v, repeats, axis=2))
    return _on_every_device(call.replace(dropout_key=None), split)


class Split(NamedTuple):
    """Axes of the mesh that split each dim of a call, as entries of a `PartitionSpec`.

    Attributes:
      batch: of the rows.
      length: of queries and keys.
      heads: of the heads while a device attends.
      outer_heads: of the heads before and after; Ulysses splits them among `sequence` in between.
      num_heads: query heads of the call.
      axes: all axes of the mesh that the compiler has to itself.
    """

    batch: Any
    length: Any
    heads: Any
    outer_heads: Any
    num_heads: int
    axes: dict[str, int]

    def count(self, entry: Any) -> int:
        return math.prod(self.axes[name] for name in _names(entry))

    def repeats(self, num_kv_heads: int) -> int:
        """How often each key head must be repeated, so that every device has those that its query heads need."""
        group, parts = self.num_heads // num_kv_heads, self.count(self.heads)
        return next(r for r in range(1, group + 1) if group % r == 0 and num_kv_heads * r % parts == 0)

    def specs(self, call: AttentionCall) -> AttentionCall:
        """The `PartitionSpec` of each array of a call."""
        return call.replace(**{name: self._spec(getattr(call, name), dims) for name, dims in _DIMS.items()})

    def _spec(self, array: Any, dims: tuple) -> Any:
        if array is None or isinstance(array, Start):
            return array
        if isinstance(array, tuple):
            return tuple(map(self._spec, array, dims))
        if jnp.ndim(array) == 0:
            return PartitionSpec()
        sizes = zip(dims, array.shape, strict=True)
        first, *others = (_names(getattr(self, dim)) if dim and size > 1 else () for dim, size in sizes)
        # Axes of one device are named too: gradients would be summed over those that are not.
        return PartitionSpec((*first, *(axis for axis, size in self.axes.items() if size == 1)), *others)


def _names(entry: Any) -> tuple[str, ...]:
    """The axes in an entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _split(call: AttentionCall) -> Split | None:
    """How the mesh in context splits a call; None if it should not, or cannot, be split here."""
    axes = automatic_axes()
    if math.prod(axes.values()) == 1:
        return None
    entries = lambda array: partition_spec(("batch", "length", "heads", None), array.shape, axes)
    batch, length, heads, _ = entries(call.q)
    length = length if entries(call.k)[1] == length else None
    if length and call.bias is not None:
        return None
    num_heads, tensor = call.q.shape[2], axes.get("tensor", 1)
    if heads is None and tensor > 1:
        _log_once(f"attention: all {num_heads} heads on every device, because tensor={tensor} does not divide them.")
    inner = heads
    if length and current().context.method == "ulysses":
        inner = (length,) if heads is None else (heads, length)
    if length and current().context.method == "ring" and "stage" not in axes:
        raise UserError(
            "ContextConfig.method 'ring' cannot run in pipeline stages: those that wait take no part in sending from "
            "neighbour to neighbour. Use 'all_gather' or 'ulysses', or MeshConfig.stage = 1."
        )
    split = Split(batch, length, inner, heads, num_heads, axes)
    if num_heads % split.count(inner):
        raise UserError(
            f"ContextConfig.method 'ulysses' cannot split {num_heads} heads among tensor x sequence = "
            f"{split.count(inner)}: use 'all_gather' or 'ring', or fewer devices on these axes."
        )
    return split


def _explicit(call: AttentionCall) -> tuple[Positions, Positions]:
    """The positions, as arrays where they are numbers and the tokens lie in another order."""
    if not context.lies_in_zigzag(call.mask) or call.offsets is None:
        return call.positions
    return tuple(side.positions + context.places(side.length, call.mask) for side in (call.queries, call.keys))


def _on_every_device(call: AttentionCall, split: Split) -> tuple[Array, Array | None]:
    def run(local: AttentionCall) -> tuple[Array, Array | None]:
        if split.length is None:
            o, lse = attend_here(local)
        else:
            o, lse = _to_all(local, split)
        return o, lse if call.return_lse else None

    # Kernels do not say over which axes their results vary. Without that check, gradients of what is whole on an axis
    # are summed over it, which is right: each of its devices has added its own part.
    return jax.shard_map(
        run,
        in_specs=(split.specs(call),),
        out_specs=PartitionSpec(split.batch, split.length, split.outer_heads),
        axis_names=set(split.axes),
        check_vma=False,
    )(call)


def _to_all(local: AttentionCall, split: Split) -> context.Result:
    """Attention of the tokens on this device to those on all; sinks come last, as they belong to the whole row."""
    call = local.replace(sinks=None, return_lse=True)
    o, lse = context.attend_to_all(call, split.axes[AXIS], pipelined="stage" not in split.axes)
    return (o, lse) if local.sinks is None else add_sinks(o, lse, local.sinks)


@functools.cache
def _log_once(message: str) -> None:
    logging.info(message)
