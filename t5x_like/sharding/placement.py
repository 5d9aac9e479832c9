"""Where a run's arrays lie on its devices: the mesh, the rules from names of dims to its axes, and choices beside them.

Whoever enters the mesh enters the `Placement`, once: `with placement.use(): ...`. What is traced within follows it.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from t5x_like.configurable import configurable

Rules = tuple[tuple[str, tuple[str, ...]], ...]

RULES: Rules = (
    ("batch", ("data", "fsdp", "expert")),
    ("length", ("sequence",)),
    ("layers", ("stage",)),
    ("expert", ("expert",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("embed", ("fsdp",)),
    ("latent", ("fsdp",)),
)
"""In order of priority: a rule applies where its mesh axes are still free in the array and divide the dim.

Of several rules for a name the first that applies holds; one without axes keeps the dim whole. Names without a rule
(head_dim, norm, position, router) stay whole. Activations and parameters share the table: in ("batch", "length",
"embed") the batch has taken `fsdp` before "embed" asks for it.
"""

FIXED = ("batch", "length", "layers", "expert")
"""Names whose rules are the parallelism itself: the loss, context, pipelines and experts count on them."""


@configurable
class ContextConfig:
    """How attention works where MeshConfig.sequence splits the length.

    Attributes:
      method: `all_gather` of keys and values (cheap with few key heads); `ulysses`, which exchanges heads for tokens
        and needs at least as many heads as devices that share them; `ring`, whose memory does not grow with the whole
        length. Layers with a sliding window exchange only what the window needs, except with `ulysses`.
      balance: gives every device an early and a late part of each row, so that a causal mask leaves all of them the
        same work. Ignored by `ulysses`, which does not need it, and where dropout is on, whose random numbers belong
        to places in the row.
    """

    method: Literal["all_gather", "ulysses", "ring"] = "all_gather"
    balance: bool = True


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh_shape: Mapping[str, int], rules: Rules = RULES
) -> PartitionSpec:
    """How an array of `shape` with these logical axes lies on a mesh with these axis sizes."""
    assert len(axes) == len(shape), (axes, shape)
    entries: list[tuple[str, ...] | str | None] = [None] * len(axes)
    settled: set[str] = set()
    free = {axis for axis, size in mesh_shape.items() if size > 1}
    for name, mesh_axes in rules:
        if name not in axes or name in settled:
            continue
        usable = tuple(axis for axis in mesh_axes if axis in free)
        dim = axes.index(name)
        if usable and shape[dim] % math.prod(mesh_shape[axis] for axis in usable) == 0:
            entries[dim] = usable if len(usable) > 1 else usable[0]
            free -= set(usable)
            settled.add(name)
        elif not mesh_axes:
            settled.add(name)
    return PartitionSpec(*entries)


def is_axes(node: Any) -> bool:
    """True for a leaf of a tree of logical axes: a plain tuple of names."""
    return type(node) is tuple and all(isinstance(name, str) for name in node)


@dataclass(frozen=True)
class Placement:
    """Where arrays lie, and how devices share the work.

    Attributes:
      mesh: devices by axis; None: one device, or a mesh that is entered without choices of its own.
      context: how attention works where the mesh splits the length.
      split_activations: see `MeshConfig`.
      rules: from names of dims to axes of the mesh, as `RULES`.
    """

    mesh: Mesh | AbstractMesh | None = None
    context: ContextConfig = ContextConfig()
    split_activations: bool = False
    rules: Rules = RULES

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Enters the mesh; what is traced within follows the choices."""
        enter = jax.sharding.use_abstract_mesh if isinstance(self.mesh, AbstractMesh) else jax.set_mesh
        with enter(self.mesh), _current(self):
            yield

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """That of an array of `shape` with these logical axes."""
        return NamedSharding(self.mesh, partition_spec(axes, shape, self.mesh.shape, self.rules))

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """A tree of them, for a tree of logical axes and an equal tree of arrays or `ShapeDtypeStruct`."""
        return jax.tree.map(lambda names, array: self.sharding(names, array.shape), axes, shapes, is_leaf=is_axes)

    @functools.cached_property
    def activation_rules(self) -> Rules:
        """The rules of activations: where heads and hidden units leave `tensor`, the length may take it."""
        if not self.split_activations:
            return self.rules
        return (*(rule for rule in self.rules if rule[0] != "length"), ("length", ("sequence", "tensor")))


_current = jax.make_user_context(Placement())


def current() -> Placement:
    """The placement in use, with its choices; read while tracing."""
    return _current.value
