"""What a model's mixtures of experts add to training: losses, metrics, and biases that balance the experts."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.models.feedforward.feedforward import FeedForward
from t5x_like.models.feedforward.router_stats import RouterStats
from t5x_like.models.parameters import Params
from t5x_like.models.transformer import ModelConfig

Stats = dict[str, dict[str, dict[str, RouterStats | None]]]
"""By stack, by `scanned` or `unrolled`, and by place in the cycle or number of the layer."""


class Routed(NamedTuple):
    """A layer with a router, or the layers at one place of a scanned cycle.

    Attributes:
      path: keys of its parameters.
      config: of the mixture.
      stats: of the router; of scanned layers with a leading dim.
      layers: the numbers of the layers.
    """

    path: tuple[str, str, str]
    config: FeedForward
    stats: RouterStats
    layers: tuple[int, ...]


def routed_layers(config: ModelConfig, stats: Stats) -> Iterator[Routed]:
    """The layers with routers, as far as there are statistics of them."""
    for name, stack in config.stacks.items():
        for (kind, place), layers in stack.places.items():
            found = stats.get(name, {}).get(kind, {}).get(place)
            if found is not None:
                yield Routed((name, kind, place), stack.blocks[layers[0]].feedforward, found, layers)


def router_objective(config: ModelConfig, stats: Stats) -> Float[Array, ""]:
    """The routers' losses, weighted as their layers say, as a mean over all layers with routers.

    What statistics of some layers give may be added to what those of the others do.
    """
    blocks = [block for stack in config.stacks.values() for block in stack.blocks]
    count = sum(block.num_experts is not None for block in blocks)
    total = jnp.zeros(())
    for _, mixture, found, _ in routed_layers(config, stats):
        total += jnp.sum(mixture.router_loss(found))
    return total / max(count, 1)


def router_metrics(config: ModelConfig, stats: Stats) -> dict[str, Float[Array, ""]]:
    """Of every layer with a router, and, under the bare names, their means.

    `expert_load_max` is the load of the busiest expert as a multiple of an equal share.
    """
    by_name: dict[str, list[Array]] = {}
    metrics = {}
    for (stack, *_), mixture, found, layers in routed_layers(config, stats):
        values = {
            "router_load_balance": found.load_balance,
            "router_z_loss": found.z_loss,
            "router_entropy": found.entropy,
            "tokens_dropped": found.dropped,
            "expert_load_max": jnp.max(found.load, axis=-1) * mixture.num_experts,
        }
        for name, value in values.items():
            for index, layer in enumerate(layers):
                metrics[f"{stack}/layer_{layer}/{name}"] = value if jnp.ndim(value) == 0 else value[index]
            by_name.setdefault(name, []).append(jnp.ravel(value))
    return {name: jnp.mean(jnp.concatenate(values)) for name, values in by_name.items()} | metrics


def balance_experts(config: ModelConfig, params: Params, stats: Stats) -> Params:
    """The parameters with the routers' balance biases moved by the loads of a step (Wang et al. 2024)."""
    for path, mixture, found, _ in routed_layers(config, stats):
        params = _replaced(params, (*path, "feedforward"), partial(mixture.balanced, stats=found))
    return params


def _replaced(tree: Any, path: tuple[str, ...], change) -> Any:
    if not path:
        return change(tree)
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], change)}
