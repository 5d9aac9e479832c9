"""From our parameters to the tensors of a family's files and back: a name map, bound to a model.

A family states a `Rule` per parameter; `*` stands for a layer's number in both names, and `#` for an expert's. Bound to
a model, the rules become one `Entry` per tensor of the files, with our shapes (`[embed, heads, head_dim]`) and theirs
(`[out, in]`).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from t5x_like.models.block import BlockConfig
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
      fused_dim: the dim of theirs along which parameters stored in one tensor stand.
      interleaved: there they take turns, element by element; else one follows the other.
    """

    to_theirs: Callable[[Array], Array]
    to_ours: Callable[[Array, Shape], Array]
    fused_dim: int
    interleaved: bool = False


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
    # gpt-oss' gates and ups: as ours, but with neighbouring columns in one tensor.
    "interleaved": Layout(lambda x: x, lambda y, shape: y.reshape(shape), -1, interleaved=True),
}


VOCABULARY = (("embedding",), ("head", "projection"), ("head", "bias"))
"""Paths of parameters with a row per token, some of which may be padding."""


class Rule(NamedTuple):
    """One row of a family's name map; a model without the parameter has no use for the row.

    Attributes:
      ours: path of the parameter, e.g. "stack/*/mixer/query/kernel", beginning with the name of the stack; several
        are fused in one tensor.
      theirs: name of the tensor, e.g. "model.layers.*.self_attn.q_proj.weight". With `#`, each expert of a mixture has
        a tensor of its own, and the rule is for layers with a mixture. Of several rules for a layer's parameter the
        first counts.
      layout: a name in LAYOUTS, or, where a layer's layout depends on its configuration, a function of that.
      always_float32: files keep it in float32, whatever the dtype of the others.
      when: whether the rule is for a layer's block; None: for all.
    """

    ours: str | tuple[str, ...]
    theirs: str
    layout: str | Callable[[BlockConfig], Layout] = "same"
    always_float32: bool = False
    when: Callable[[BlockConfig], bool] | None = None


class Part(NamedTuple):
    """A parameter, or one layer or expert of it, in a tensor.

    Attributes:
      path: of the parameter.
      index: of the layer and of the expert in a parameter that stacks several; empty: the whole parameter.
      shape: ours, without the stacking and without the rows that pad the vocabulary.
      where: its place in the tensor, along the layout's fused dim.
    """

    path: Path
    index: tuple[int, ...]
    shape: Shape
    where: slice


class Entry(NamedTuple):
    """A tensor of the files: its name and shape there, and what it holds."""

    name: str
    shape: Shape
    layout: Layout
    parts: tuple[Part, ...]
    always_float32: bool

    def part_of(self, theirs: np.ndarray, part: Part) -> np.ndarray:
        """Our array for one of the parts."""
        return self.layout.to_ours(theirs[self._place(part)], part.shape)

    def fuse(self, ours: Iterator[np.ndarray]) -> np.ndarray:
        """Their tensor, from our arrays for all parts in their order."""
        if len(self.parts) == 1:
            return self.layout.to_theirs(next(ours))
        theirs = None
        for part, array in zip(self.parts, ours, strict=True):
            theirs = np.empty(self.shape, array.dtype) if theirs is None else theirs
            theirs[self._place(part)] = self.layout.to_theirs(array)
        return theirs

    def _place(self, part: Part) -> tuple[slice, ...]:
        index = [slice(None)] * len(self.shape)
        index[self.layout.fused_dim] = part.where
        return tuple(index)


def bind(rules: Sequence[Rule], config: ModelConfig, shapes: Params, vocab_size: int) -> list[Entry]:
    """The tensors that hold a model, in the order of the rules.

    Args:
      rules: the family's; together they name every parameter of the model.
      config: of the model.
      shapes: its parameters, or their shapes.
      vocab_size: rows of embedding and head in the files; more rows of ours are padding.
    """
    flat = traverse_util.flatten_dict(shapes)
    entries: list[Entry] = []
    held: set[tuple[Path, int | None]] = set()
    for rule in rules:
        ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        stack = config.stacks.get(ours[0].split("/")[0])
        for layer in range(stack.num_layers) if stack is not None and "*" in rule.theirs else (None,):
            located = [_locate(name, layer, stack) for name in ours]
            block = None if layer is None else stack.blocks[layer]
            if located[0][0] not in flat or held.intersection(located):
                continue
            if rule.when is not None and not rule.when(block):
                continue
            if "#" in rule.theirs and block.num_experts is None:
                continue
            layout = LAYOUTS[rule.layout] if isinstance(rule.layout, str) else rule.layout(block)
            held.update(located)
            for expert in range(block.num_experts) if "#" in rule.theirs else (None,):
                name = rule.theirs.replace("*", str(layer)).replace("#", str(expert))
                places = [(path, tuple(i for i in (index, expert) if i is not None)) for path, index in located]
                own = [_own_shape(flat[path].shape, path, index, vocab_size) for path, index in places]
                entries.append(_entry(name, layout, places, own, rule.always_float32))
    missing = set(flat) - {path for path, _ in held}
    assert not missing, f"no rule for {sorted(missing)}"
    return entries


def _locate(name: str, layer: int | None, stack: StackConfig | None) -> tuple[Path, int | None]:
    """The path of a parameter, and the index of its layer where it stacks several."""
    path = name.split("/")
    if layer is None:
        return tuple(path), None
    place, index = stack.locate(layer)
    return (path[0], *place, *path[2:]), index


def _own_shape(shape: Shape, path: Path, index: tuple[int, ...], vocab_size: int) -> Shape:
    return (vocab_size, *shape[1:]) if path in VOCABULARY else shape[len(index) :]


def _entry(
    name: str,
    layout: Layout,
    places: Sequence[tuple[Path, tuple[int, ...]]],
    own: Sequence[Shape],
    always_float32: bool,
) -> Entry:
    theirs = [_their_shape(layout, shape) for shape in own]
    dim = layout.fused_dim % len(theirs[0])
    sizes, count = [shape[dim] for shape in theirs], len(theirs)
    if layout.interleaved:
        where = [slice(i, None, count) for i in range(count)]
    else:
        where = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(count)]
    parts = tuple(Part(*place, *rest) for place, *rest in zip(places, own, where, strict=True))
    shape = tuple(sum(sizes) if i == dim else size for i, size in enumerate(theirs[0]))
    assert math.prod(shape) == sum(math.prod(part.shape) for part in parts)
    return Entry(name, shape, layout, parts, always_float32)


@functools.cache
def _their_shape(layout: Layout, shape: Shape) -> Shape:
    return jax.eval_shape(layout.to_theirs, jax.ShapeDtypeStruct(shape, np.float32)).shape
