"""Predicts the memory of a traced program without compiling it: plays it in order and counts what is alive."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxprs_in_params

from t5x_like.models.remat import ELEMENTWISE
from t5x_like.sharding.logical import RULES

Size = Callable[[Any], int]
"""Bytes on one device of a value's shape and dtype."""

FUSED = ELEMENTWISE | {
    "and",
    "bitcast_convert_type",
    "custom_jvp_call",
    "eq",
    "ge",
    "gt",
    "iota",
    "le",
    "lt",
    "mesh_cast",
    "name",
    "ne",
    "not",
    "or",
    "pad",
    "pvary",
    "random_bits",
    "random_fold_in",
    "random_seed",
    "random_unwrap",
    "random_wrap",
    "reduce_precision",
    "rem",
    "sharding_constraint",
    "shift_right_logical",
    "slice",
    "stop_gradient",
    "threefry2x32",
    "transpose",
    "xor",
}
"""Primitives that a compiler computes inside their consumer: one that is read once takes no memory."""


def peak_bytes(jaxpr: ClosedJaxpr | Jaxpr, size: Size, donated: int = 0) -> int:
    """Most bytes alive at one time beside the program's arguments.

    Args:
      jaxpr: of `jax.make_jaxpr`.
      size: of a value on a device.
      donated: leading results that take the place of arguments and so cost nothing.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return _Player(size).peak(inner, set(inner.outvars[:donated]))


class _Player:
    def __init__(self, size: Size):
        self.size = size

    def peak(self, jaxpr: Jaxpr, free: set) -> int:
        """Most bytes alive inside a program beside its inputs; values in `free` have memory elsewhere."""
        left = Counter(v for e in jaxpr.eqns for v in e.invars if isinstance(v, Var))
        results = {v for v in jaxpr.outvars if isinstance(v, Var)}
        readers = left.copy()
        alive: dict[Var, int] = {}
        most = 0
        for equation in jaxpr.eqns:
            name, inside = equation.primitive.name, self._inside(equation)
            fused = name in FUSED
            made = {
                v: size
                for v, size in self._sizes(equation).items()
                if v not in free and (not fused or readers[v] > 1 or v in results)
            }
            left.subtract(v for v in equation.invars if isinstance(v, Var))
            dead = [v for v in alive if left[v] <= 0 and v not in results]
            # Elementwise results take the place of what they are the last to read.
            kept = sum(alive.values()) - (sum(alive[v] for v in dead) if fused else 0)
            alive |= made
            most = max(most, kept + sum(made.values()) + inside)
            for v in [*dead, *(v for v in made if not readers[v] and v not in results)]:
                del alive[v]
        return most

    def _sizes(self, equation: Any) -> dict[Var, int]:
        """Of the results; those of a `shard_map` are as large as its body says, whatever they are called outside."""
        if equation.primitive.name != "shard_map":
            return {v: self.size(v.aval) for v in equation.outvars}
        (body,) = jaxprs_in_params(equation.params)
        return {v: _local_size(inner.aval) for v, inner in zip(equation.outvars, body.outvars, strict=True)}

    def _inside(self, equation: Any) -> int:
        """Bytes that an equation's own program needs, beside its inputs and results."""
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            return 0
        inner = [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in jaxprs_in_params(params)]
        if name == "scan":
            (body,) = inner
            # A turn's slices of the stacked results are written in place; its carry exists twice.
            pairs = zip(body.outvars, equation.outvars, strict=True)
            return self.peak(body, {inner for inner, whole in pairs if inner.aval.ndim < whole.aval.ndim})
        if name == "shard_map":
            return max((_Player(_local_size).peak(p, set(p.outvars)) for p in inner), default=0)
        return max((self.peak(p, set(p.outvars)) for p in inner), default=0)


def _local_size(aval: Any) -> int:
    """Inside `shard_map` shapes are those of a device."""
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def batch_shares(mesh: Mapping[str, int]) -> int:
    """How many ways a mesh splits the batch."""
    return math.prod(mesh[axis] for axis in dict(RULES)["batch"])


def sharded_size(mesh: dict[str, int], rows: set[int], lengths: set[int], tensor_dims: set[int], state: dict) -> Size:
    """Sizes on a device by shape alone: what has rows is split as the batch is, what has heads as they are.

    Args:
      mesh: sizes of its axes.
      rows: of the batch and of a microbatch.
      lengths: of the sequences.
      tensor_dims: sizes of dims that the tensor axis splits (heads, hidden units, vocabulary).
      state: bytes on a device of parameters (and what is shaped like them) by shape.
    """
    shares_of_rows = batch_shares(mesh)
    with_rows = rows | {count * length for count in rows for length in lengths}

    def size(aval: Any) -> int:
        if not hasattr(aval, "shape") or not jax.dtypes.issubdtype(aval.dtype, jax.numpy.generic):
            return 0
        whole = math.prod(aval.shape) * aval.dtype.itemsize
        if aval.dtype.itemsize == 4 and aval.shape in state:
            return state[aval.shape]
        shares = 1
        if not with_rows.isdisjoint(aval.shape):
            shares *= shares_of_rows
            shares *= mesh["sequence"] if not lengths.isdisjoint(aval.shape) else 1
        if not tensor_dims.isdisjoint(aval.shape):
            shares *= mesh["tensor"]
        return whole // shares

    return size
