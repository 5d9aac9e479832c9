"""Layers by number, wherever their parameters are: a stack that groups its layers otherwise reads what another saved.

A stack may keep the parameters of a layer in an array of its own, or stack those of several layers in one. Checkpoints
hold arrays as they are in memory, with the numbers of the layers at each place; who restores them into other places
reads the saved arrays and restacks or slices them on the devices, one parameter at a time.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, PyTree

Name = tuple[str, ...]
Arrays = Mapping[Name, Array]
Shapes = Mapping[Name, jax.ShapeDtypeStruct]
Layers = Mapping[str, Sequence[int]]
"""The numbers of the layers at each place, e.g. `"stack/scanned/0": (0, 1)`; at `scanned` they are stacked."""
Parameter = tuple[Name, str, Name]
"""What is the same for every layer: the names before the stack, the stack, and the names behind the place."""


def by_name(tree: PyTree) -> dict[Name, Any]:
    """Leaves by their path in the tree, in the tree's order; tuples and classes name theirs like dicts do."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def located(name: Name, layers: Layers) -> tuple[Parameter, str] | tuple[None, None]:
    """The parameter that a name is of, and its place; None without one."""
    for start in range(len(name) - 2):
        place = "/".join(name[start : start + 3])
        if place in layers:
            return (name[:start], name[start], name[start + 3 :]), place
    return None, None


def moved(old: Layers, new: Layers) -> tuple[Layers, Layers]:
    """What both say of stacks that have the same layers at other places."""
    before, after = _by_stack(old), _by_stack(new)
    numbers = lambda places: sorted(number for layers in places.values() for number in layers)
    stacks = [s for s in after if s in before and before[s] != after[s] and numbers(before[s]) == numbers(after[s])]
    return tuple({place: part[s][place] for s in stacks for place in part[s]} for part in (before, after))


def relaid(arrays: Arrays, old: Layers, new: Layers) -> dict[Name, Array]:
    """The arrays, those of layers at `old` places at their `new` ones; the names of others are theirs still.

    Trees like the parameters (an average, moments) are told by the names of places, wherever they are. A place of which
    a layer is missing, or whose layers have unlike arrays, gets none.
    """
    result: dict[Name, Array] = {}
    places, parts = _by_stack(new), defaultdict[Parameter, dict[int, Array]](dict)
    for name, array in arrays.items():
        parameter, place = located(name, old)
        if place is None:
            result[name] = array
            continue
        for i, number in enumerate(old[place]):
            parts[parameter][number] = array[i] if _stacks(place) else array
    for (before, stack, behind), layers in parts.items():
        for place, numbers in places[stack].items():
            here = [layers[number] for number in numbers if number in layers]
            if len(here) == len(numbers) and len({(array.shape, array.dtype) for array in here}) == 1:
                result[*before, *place.split("/"), *behind] = jnp.stack(here) if _stacks(place) else here[0]
    return result


def sources(saved: Shapes, target: Shapes, old: Layers, new: Layers) -> dict[Name, jax.ShapeDtypeStruct]:
    """What to read of the saved arrays for `target`, whose places are the `new` ones, sharded like there."""
    result: dict[Name, jax.ShapeDtypeStruct] = {}
    wanted: dict[tuple[Parameter, int], tuple[str, Sharding]] = {}
    for name, leaf in target.items():
        parameter, place = located(name, new)
        if place is None:
            result[name] = leaf
        else:
            wanted.update(dict.fromkeys(((parameter, number) for number in new[place]), (place, leaf.sharding)))
    for name, leaf in saved.items():
        parameter, place = located(name, old)
        numbers = [] if place is None else [number for number in old[place] if (parameter, number) in wanted]
        if numbers:
            at, sharding = wanted[parameter, numbers[0]]
            sharding = _sharding(sharding, _stacks(at), leaf.shape, _stacks(place))
            result[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return result


def relay(arrays: dict[Name, Array], target: Shapes, old: Layers, new: Layers) -> dict[Name, Array]:
    """`relaid` on the devices for what `sources` are, into the shardings of `target`; empties `arrays` as it goes."""
    result: dict[Name, Array] = {}
    parts: dict[Parameter, dict[Name, Array]] = defaultdict(dict)
    shardings: dict[Parameter, dict[Name, Sharding]] = defaultdict(dict)
    for name, leaf in target.items():
        parameter, place = located(name, new)
        if place is None:
            result[name] = arrays.pop(name)
        else:
            shardings[parameter][tuple(place.split("/"))] = leaf.sharding
    while arrays:
        name, array = arrays.popitem()
        parameter, place = located(name, old)
        parts[parameter][tuple(place.split("/"))] = array
    for parameter, wanted in shardings.items():
        before, _, behind = parameter
        move = _moving(tuple(old.items()), tuple(new.items()), tuple(wanted.items()))
        result |= {(*before, *place, *behind): array for place, array in move(parts.pop(parameter)).items()}
    return result


@functools.cache
def _moving(old, new, shardings):
    """Compiled once for all that have these shardings, which the moments of a parameter share with it."""
    place = lambda arrays: {name: relaid(arrays, dict(old), dict(new))[name] for name, _ in shardings}
    return jax.jit(place, out_shardings=dict(shardings))


def _sharding(sharding: Sharding, stacked: bool, shape: tuple[int, ...], becomes_stacked: bool) -> Sharding:
    """That of an array of `shape` whose layers are sharded as those of another are."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = list(sharding.spec) + [None] * (len(shape) - becomes_stacked + stacked - len(sharding.spec))
    layers = spec.pop(0) if stacked else None
    spec = [None] * becomes_stacked + spec
    if layers is not None:
        # The axis that has parted the layers parts something else: else every device would hold all of them.
        share = math.prod(sharding.mesh.shape[axis] for axis in ((layers,) if isinstance(layers, str) else layers))
        dims = (dim for dim, size in enumerate(shape) if spec[dim] is None and size % share == 0)
        if (dim := next(dims, None)) is not None:
            spec[dim] = layers
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _by_stack(layers: Layers) -> dict[str, Layers]:
    result: dict[str, dict[str, tuple[int, ...]]] = {}
    for place, numbers in layers.items():
        result.setdefault(place.split("/")[0], {})[place] = tuple(numbers)
    return result


def _stacks(place: str) -> bool:
    return place.split("/")[1] == "scanned"
