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
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.attention import door
from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.flash import add_sinks
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.sharding import context
from t5x_like.sharding.logical import automatic_axes, partition_spec
from t5x_like.sharding.placement import current
from t5x_like.sharding.token_runs import AXIS, Heads, Options, Side


class Arrays(NamedTuple):
    """All arrays of a call of attention; a position may be a number."""

    q: Array
    k: Array
    v: Array
    segment_ids: tuple[Array, Array] | None
    positions: tuple[door.Side, door.Side]
    table: Array | None
    alibi_slopes: Array | None
    bias: Array | None
    sinks: Array | None


_TOKENS = ("batch", "length", "outer_heads", None)
_SIDES = (("batch", "length"), ("batch", "length"))
_DIMS = Arrays(
    q=_TOKENS,
    k=_TOKENS,
    v=_TOKENS,
    segment_ids=_SIDES,
    positions=_SIDES,
    table=("heads", None),
    alibi_slopes=("heads",),
    bias=("batch", "heads", "length", None),
    sinks=("outer_heads",),
)
"""What the dims of each array are, by the names of `Split`."""


def attention(
    q: Float[Array, "batch q_length heads head_dim"],
    k: Float[Array, "batch kv_length kv_heads head_dim"],
    v: Float[Array, "batch kv_length kv_heads v_dim"],
    *,
    mask: MaskSpec = MaskSpec(),
    segment_ids: tuple[Int[Array, "batch q_length"], Int[Array, "batch kv_length"]] | None = None,
    positions: tuple[door.Side, door.Side] | None = None,
    relative_bias: tuple[RelativeBias, Float[Array, "heads num_buckets"]] | None = None,
    alibi_slopes: Float[Array, "heads"] | None = None,
    bias: Float[Array, "#batch #heads #q_length #kv_length"] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    return_lse: bool = False,
    **options: Any,
) -> (
    Float[Array, "batch q_length heads v_dim"]
    | tuple[Float[Array, "batch q_length heads v_dim"], Float[Array, "batch q_length heads"]]
):
    """`kernels.attention.attention`, with its arguments, on the mesh in context.

    Rows, heads and tokens are split as `sharding.logical.RULES` say; key heads that are too few are repeated. An axis
    that does not divide its dim does the same work on all of its devices. Calls with dropout are left to the compiler,
    which makes the random numbers of one device on any mesh.

    Raises:
      UserError: as `kernels.attention.attention`; or if the heads are too few for `ContextConfig.method`.
    """
    spec, table = relative_bias or (None, None)
    arrays = Arrays(q, k, v, segment_ids, positions or (0, 0), table, alibi_slopes, bias, sinks)
    options = Options(mask, spec, tuple(sorted(options.items())))
    split = None if dropout_rate else _split(arrays)
    if split is None or split.length is None:
        arrays = arrays._replace(positions=_explicit(arrays, mask))
    if split is None:
        return _door(arrays, options, dropout_rate=dropout_rate, dropout_key=dropout_key, return_lse=return_lse)
    repeats = split.repeats(k.shape[2])
    if repeats > 1:
        arrays = arrays._replace(k=jnp.repeat(k, repeats, axis=2), v=jnp.repeat(v, repeats, axis=2))
    return _on_every_device(arrays, options, split, return_lse)


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

    def specs(self, array: Any, dims: tuple) -> Any:
        """The `PartitionSpec` of an array with these dims, or of each array of a tuple."""
        if array is None:
            return None
        if isinstance(array, Arrays):
            return Arrays(*map(self.specs, array, dims))
        if isinstance(array, tuple):
            return tuple(map(self.specs, array, dims))
        if jnp.ndim(array) == 0:
            return PartitionSpec()
        sizes = zip(dims, array.shape, strict=True)
        first, *others = (_names(getattr(self, dim)) if dim and size > 1 else () for dim, size in sizes)
        # Axes of one device are named too: gradients would be summed over those that are not.
        return PartitionSpec((*first, *(axis for axis, size in self.axes.items() if size == 1)), *others)


def _names(entry: Any) -> tuple[str, ...]:
    """The axes in an entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _split(arrays: Arrays) -> Split | None:
    """How the mesh in context splits a call; None if it should not, or cannot, be split here."""
    axes = automatic_axes()
    if math.prod(axes.values()) == 1:
        return None
    entries = lambda array: partition_spec(("batch", "length", "heads", None), array.shape, axes)
    batch, length, heads, _ = entries(arrays.q)
    length = length if entries(arrays.k)[1] == length else None
    if length and arrays.bias is not None:
        return None
    num_heads, tensor = arrays.q.shape[2], axes.get("tensor", 1)
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


def _explicit(arrays: Arrays, mask: MaskSpec) -> tuple[door.Side, door.Side]:
    """The positions, as arrays where they are numbers and the tokens lie in another order."""
    if not context.lies_in_zigzag(mask) or any(jnp.ndim(side) for side in arrays.positions):
        return arrays.positions
    lengths = (arrays.q.shape[1], arrays.k.shape[1])
    return tuple(side + context.places(n, mask) for side, n in zip(arrays.positions, lengths, strict=True))


def _on_every_device(arrays: Arrays, options: Options, split: Split, return_lse: bool) -> Any:
    # Numbers known while tracing stay known inside: they tell kernels which blocks to skip.
    known = tuple(side if isinstance(side, int) else None for side in arrays.positions)
    given = arrays._replace(positions=tuple(None if isinstance(side, int) else side for side in arrays.positions))

    def attend(local: Arrays) -> Any:
        sides = zip(known, local.positions, strict=True)
        local = local._replace(positions=tuple(inside if side is None else side for side, inside in sides))
        if split.length is None:
            return _door(local, options, return_lse=return_lse)
        o, lse = _to_all(local, options, split)
        return (o, lse) if return_lse else o

    # Kernels do not say over which axes their results vary. Without that check, gradients of what is whole on an axis
    # are summed over it, which is right: each of its devices has added its own part.
    return jax.shard_map(
        attend,
        in_specs=(split.specs(given, _DIMS),),
        out_specs=PartitionSpec(split.batch, split.length, split.outer_heads),
        axis_names=set(split.axes),
        check_vma=False,
    )(given)


def _to_all(local: Arrays, options: Options, split: Split) -> context.Result:
    """Attention of the tokens on this device to those on all; sinks come last, as they belong to the whole row."""
    ids = local.segment_ids or (None, None)
    queries = Side((local.q,), local.positions[0], ids[0])
    keys = Side((local.k, local.v), local.positions[1], ids[1])
    heads = Heads(local.table, local.alibi_slopes)
    o, lse = context.attend_to_all(options, queries, keys, heads, split.axes[AXIS], pipelined="stage" not in split.axes)
    return (o, lse) if local.sinks is None else add_sinks(o, lse, local.sinks)


def _door(arrays: Arrays, options: Options, **others: Any) -> Any:
    return door.attention(
        arrays.q,
        arrays.k,
        arrays.v,
        mask=options.mask,
        segment_ids=arrays.segment_ids,
        positions=arrays.positions,
        relative_bias=None if options.relative_bias is None else (options.relative_bias, arrays.table),
        alibi_slopes=arrays.alibi_slopes,
        bias=arrays.bias,
        sinks=arrays.sinks,
        **dict(options.other),
        **others,
    )


@functools.cache
def _log_once(message: str) -> None:
    logging.info(message)
