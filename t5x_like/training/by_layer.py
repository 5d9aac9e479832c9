"""Numbers about every parameter, or its gradient; of parameters stacked over layers, about each layer."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from t5x_like.models.parameters import Params


def by_layer(reduce: Callable[..., Array], tree: Params, axes: Params) -> Params:
    """`reduce(array, axis=dims)` of every array, over all dims but that of stacked layers; the same on all devices.

    Args:
      reduce: e.g. a norm.
      tree: parameters, or what has their form.
      axes: the parameters' logical axes.
    """

    def reduced(x: Array, names: tuple[str, ...]) -> Array:
        return reduce(x, axis=tuple(range(names[:1] == ("layers",), x.ndim)))

    return jax.lax.with_sharding_constraint(jax.tree.map(reduced, tree, axes), PartitionSpec())


def norm(x: Array, axis: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis))


def named(tree: Params) -> Iterator[tuple[str, float]]:
    """Fetches results of `by_layer`; `[2]` behind a name is the third layer of those stacked there."""
    for path, values in jax.tree.leaves_with_path(jax.device_get(tree)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if values.ndim:
            yield from ((f"{name}[{i}]", value) for i, value in enumerate(values.tolist()))
        else:
            yield name, values.item()
