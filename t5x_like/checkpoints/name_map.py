"""From our parameters to the tensors of a family's files and back: a name map, bound to a model.

A family states a `Rule` per parameter; `*` stands for a layer's number in both names. Bound to a model, the rules
become one `Entry` per tensor of the files, with our shapes (`[embed, heads, head_dim]`) and theirs (`[out, in]`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from t5x_like.models.parameters import Params
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import ModelConfig

Path = tuple[str, ...]
Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a family stores a parameter: a change of order and of dims, never of values.

    Attributes:
      to_theirs: our array -> theirs.
      to_ours: (their array, our shape) -> our array.
      fused_dim: the dim of theirs along which parameters stored in one tensor follow each other.
    """

    to_theirs: Callable[[Array], Array]
    to_ours: Callable[[Array, Shape], Array]
    fused_dim: int


LAYOUTS = {
    "same": Layout(lambda x: x, lambda y, shape: y.reshape(shape), 0),
    # Biases of heads: [heads, head_dim] in one dim.
    "flat": Layout(lambda x: x.reshape(-1), lambda y, shape: y.reshape(shape), 0),
    # torch.nn.Linear keeps [out, in]; heads and head_dim are one dim, which may be `in` or `out`.
    "linear": Layout(lambda x: x.reshape(x.shape[0], -1).T, lambda y, shape: y.T.reshape(shape), 0),
    "linear_from_heads": Layout(lambda x: x.reshape(-1, x.shape[-1]).T, lambda y, shape: y.T.reshape(shape), 0),
    # GPT-2's Conv1D keeps [in, out].
    "conv1d": Layout(lambda x: x.reshape(x.shape[0], -1), lambda y, shape: y.reshape(shape), 1),
    "conv1d_from_heads": Layout(lambda x: x.reshape(-1, x.shape[-1]), lambda y, shape: y.reshape(shape), 1),
}


VOCABULARY = (("embedding",), ("head", "projection"))
"""Paths of parameters with a row per token, some of which may be padding."""


class Rule(NamedTuple):
    """One row of a family's name map; a model without the parameter has no use for the row.

    Attributes:
      ours: path of the parameter, e.g. "stack/*/attention/query/kernel", beginning with the name of the stack; several
        are fused in one tensor.
      theirs: name of the tensor, e.g. "model.layers.*.self_attn.q_proj.weight".
      layout: a name in LAYOUTS.
    """

    ours: str | tuple[str, ...]
    theirs: str
    layout: str = "same"


class Part(NamedTuple):
    """A parameter, or one layer of it, in a tensor.

    Attributes:
      path: of the parameter.
      layer: index of the layer in a parameter that stacks several; None: the whole parameter.
      shape: ours, without the stacking and without the rows that pad the vocabulary.
      begin: where it begins in the tensor, along the layout's fused dim.
      size: how long it is there.
    """

    path: Path
    layer: int | None
    shape: Shape
    begin: int
    size: int


class Entry(NamedTuple):
    """A tensor of the files: its name and shape there, and what it holds."""

    name: str
    shape: Shape
    layout: Layout
    parts: tuple[Part, ...]

    def part_of(self, theirs: np.ndarray, part: Part) -> np.ndarray:
        """Our array for one of the parts."""
        index = [slice(None)] * theirs.ndim
        index[self.layout.fused_dim] = slice(part.begin, part.begin + part.size)
        return self.layout.to_ours(theirs[tuple(index)], part.shape)

    def fuse(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor, from our arrays for all parts."""
        theirs = [self.layout.to_theirs(array) for array in ours]
        return theirs[0] if len(theirs) == 1 else np.concatenate(theirs, axis=self.layout.fused_dim)


def bind(rules: Sequence[Rule], config: ModelConfig, shapes: Params, vocab_size: int) -> list[Entry]:
    """The tensors that hold a model, in the order of the rules.

    Args:
      rules: the family's; together they name every parameter of the model.
      config: of the model.
      shapes: its parameters, or their shapes.
      vocab_size: rows of embedding and head in the files; more rows of ours are padding.
    """
    flat = traverse_util.flatten_dict(shapes)
    entries = []
    for rule in rules:
        ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        stack = config.stacks.get(ours[0].split("/")[0])
        for layer in range(stack.num_layers) if stack is not None and "*" in rule.theirs else (None,):
            located = [_locate(name, layer, stack) for name in ours]
            if located[0][0] in flat:
                own = [_own_shape(flat[path].shape, path, index, vocab_size) for path, index in located]
                name = rule.theirs.replace("*", str(layer))
                entries.append(_entry(name, LAYOUTS[rule.layout], located, own))
    held = {part.path for entry in entries for part in entry.parts}
    assert held == set(flat), f"no rule for {sorted(set(flat) - held)}"
    return entries


def _locate(name: str, layer: int | None, stack: StackConfig | None) -> tuple[Path, int | None]:
    """The path of a parameter, and the index of its layer where it stacks several."""
    path = name.split("/")
    if layer is None:
        return tuple(path), None
    place, index = stack.locate(layer)
    return (path[0], *place, *path[2:]), index


def _own_shape(shape: Shape, path: Path, layer: int | None, vocab_size: int) -> Shape:
    if path in VOCABULARY:
        return (vocab_size, *shape[1:])
    return shape if layer is None else shape[1:]


def _entry(name: str, layout: Layout, located: Sequence[tuple[Path, int | None]], own: Sequence[Shape]) -> Entry:
    theirs = [jax.eval_shape(layout.to_theirs, jax.ShapeDtypeStruct(shape, np.float32)).shape for shape in own]
    dim = layout.fused_dim
    sizes = [shape[dim] for shape in theirs]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = tuple(Part(*place, *rest) for place, *rest in zip(located, own, begins, sizes, strict=True))
    shape = tuple(sum(sizes) if i == dim else size for i, size in enumerate(theirs[0]))
    assert math.prod(shape) == sum(math.prod(part.shape) for part in parts)
    return Entry(name, shape, layout, parts)
