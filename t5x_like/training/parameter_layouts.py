"""Parameters seen as matrices, whatever their layout: what Muon, Adafactor and weight decay work on.

A parameter's array may hold many matrices (the layers of a scanned stack, the experts of a layer), and a matrix may be
spread over three dims (`[embed, heads, head_dim]` is a matrix of `embed` rows). `Layout` reads both from the logical
axis names, so that an update does not depend on how the model is laid out: scanned and unrolled layers train alike.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

STACKED = ("layers", "expert")
"""Leading logical axes that count separate parameters."""

VECTORS = ("bias", "scale")
"""Last path keys of parameters that are added or scale, of any number of dims: never matrices."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the matrices are in a parameter's array.

    Attributes:
      axes: logical name of every dim.
      stack: number of leading dims that count separate parameters.
      split: the dim at which a matrix's columns begin (its rows are the dims from `stack` to `split`); None: no matrix.
    """

    axes: tuple[str, ...]
    stack: int
    split: int | None

    @property
    def is_matrix(self) -> bool:
        return self.split is not None

    @property
    def own_dims(self) -> tuple[int, ...]:
        """The dims of one parameter of the stack."""
        return tuple(range(self.stack, len(self.axes)))

    def as_matrices(self, x: Float[Array, "..."]) -> Float[Array, "*stack rows columns"]:
        """Returns `x` with the dims of its rows merged into one, and those of its columns."""
        rows = math.prod(x.shape[self.stack : self.split])
        return x.reshape(*x.shape[: self.stack], rows, -1)


def layouts_of(axes: Any) -> Any:
    """Returns the tree of `Layout`s for a tree of logical axis names (nested dicts of tuples)."""
    return jax.tree.map_with_path(
        lambda path, names: _layout(path[-1].key, names), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def _layout(key: str, axes: tuple[str, ...]) -> Layout:
    stack = 0
    while stack < len(axes) and axes[stack] in STACKED:
        stack += 1
    own = axes[stack:]
    if key in VECTORS or len(own) < 2:
        return Layout(axes, stack, None)
    # Kernels read from or write to the residual stream, whose dim is one side of the matrix; the rest is the other.
    return Layout(axes, stack, stack + 1 if own[0] == "embed" else len(axes) - 1)


def root_mean_square(x: Float[Array, "..."], layout: Layout) -> Float[Array, "..."]:
    """Returns the root mean square of each parameter of the stack, with its dims kept at size 1."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=layout.own_dims, keepdims=True))


def clip_by_root_mean_square(layouts: Any, threshold: float) -> optax.GradientTransformation:
    """Scales each parameter's update down to a root mean square of at most `threshold`."""

    def clip(update, layout):
        return update / jnp.maximum(1.0, root_mean_square(update, layout) / threshold)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates, layouts))


def scale_by_parameter(layouts: Any, floor: float = 1e-3) -> optax.GradientTransformation:
    """Multiplies each parameter's update by the parameter's root mean square, at least `floor` (Adafactor, 8)."""

    def scale(update, param, layout):
        return update * jnp.maximum(root_mean_square(param, layout), floor)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, layouts))


class Factored(NamedTuple):
    """Row and column means of the second moment of each matrix of a stack."""

    row: Float[Array, "*stack rows"]
    column: Float[Array, "*stack columns"]


class FactoredState(NamedTuple):
    """State of `scale_by_factored_moment`; a moment is `Factored`, or has its parameter's shape."""

    count: Array
    moments: Any


def scale_by_factored_moment(
    layouts: Any, *, decay_rate: float, min_dim_size_to_factor: int, eps: float = 1e-30
) -> optax.GradientTransformation:
    """Divides gradients by the root of their second moment, factored for matrices (Adafactor's algorithm 4).

    Args:
      layouts: the `Layout` of every parameter.
      decay_rate: the moment decays by `1 - t ** -decay_rate` at the `t`-th update.
      min_dim_size_to_factor: matrices with fewer rows or columns keep the whole moment.
      eps: added to squared gradients.
    """

    def init_one(param, layout):
        if layout.is_matrix:
            matrices = layout.as_matrices(param)
            if min(matrices.shape[-2:]) >= min_dim_size_to_factor:
                return Factored(jnp.zeros_like(matrices[..., 0]), jnp.zeros_like(matrices[..., 0, :]))
        return jnp.zeros_like(param)

    def update_one(grad, moment, layout, decay):
        def average(old, new):
            return decay * old + (1 - decay) * new

        if not isinstance(moment, Factored):
            moment = average(moment, jnp.square(grad) + eps)
            return grad * jax.lax.rsqrt(moment), moment
        matrices = layout.as_matrices(grad)
        square = jnp.square(matrices) + eps
        row, column = average(moment.row, square.mean(-1)), average(moment.column, square.mean(-2))
        row_factor = jax.lax.rsqrt(row / row.mean(-1, keepdims=True))
        update = matrices * row_factor[..., :, None] * jax.lax.rsqrt(column)[..., None, :]
        return update.reshape(grad.shape), Factored(row, column)

    def init(params):
        return FactoredState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params, layouts))

    def update(updates, state, params=None):
        del params
        decay = 1.0 - (state.count + 1.0) ** -decay_rate
        grads, structure = jax.tree.flatten(updates)
        moments, each_layout = structure.flatten_up_to(state.moments), structure.flatten_up_to(layouts)
        pairs = [update_one(*one, decay) for one in zip(grads, moments, each_layout, strict=True)]
        updates, moments = (structure.unflatten(side) for side in zip(*pairs, strict=True))
        return updates, FactoredState(optax.safe_increment(state.count), moments)

    return optax.GradientTransformation(init, update)
