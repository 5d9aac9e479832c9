"""Numbers about every parameter, or its gradient; of parameters stacked over layers, about each layer."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from t5x_like.checkpoints.layers import Layers, by_name, located
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


def named(tree: Params, layers: Layers) -> Iterator[tuple[str, float]]:
    """Fetches results of `by_layer`; in their names, e.g. `stack/2/mixer/out/kernel`, stands the number of the layer.

    Args:
      tree: the results.
      layers: at each place of the tree.
    """
    for name, values in by_name(jax.device_get(tree)).items():
        parameter, place = located(name, layers)
        if place is None:
            yield "/".join(name), values.item()
            continue
        before, stack, behind = parameter
        for number, value in zip(layers[place], values.reshape(-1).tolist(), strict=True):
            yield "/".join((*before, stack, str(number), *behind)), value
