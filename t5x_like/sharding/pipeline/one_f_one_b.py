"""The pipeline schedule in which every microbatch goes backward as soon as it is through (1F1B).

Narayanan et al. 2019 (PipeDream, section 3.2) and 2021 (section 2.2). At each tick a stage runs one microbatch forward
and another one backward, with other stages in step:

    microbatch m is forward on stage s at tick m + s, and backward at tick m + 2 (S - 1) - s.

Between the two the stage keeps nothing but its input, and runs forward again. So it holds 2 (S - 1 - s) + 1 inputs at
one time, however many microbatches there are: the first stage none, as it makes its own from the batch, and the others
2 S - 3 at most. A tick at the beginning is forward alone and one at the end backward alone, so that the bubble is that
of GPipe.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_like.sharding.pipeline.gpipe import by_microbatch, in_batch, manual_axes, num_ticks

Tree = Any
Vectors = Float[Array, "rows length embed"]
Objective = Float[Array, ""]


class Pieces(NamedTuple):
    """A model, cut where its stages are; `rows` is what belongs to the rows of a microbatch.

    Each returns what it adds to the objective, and results, which are added up over the microbatches.

    Attributes:
      first: (rest, rows) -> ((vectors, objective), results), on the first stage.
      layers: (layers, rest, vectors, rows) -> ((vectors, objective), results), on every stage.
      last: (rest, vectors, rows) -> (objective, results), on the last stage.
    """

    first: Callable[[Tree, Tree], tuple[tuple[Vectors, Objective], Tree]]
    layers: Callable[[Tree, Tree, Vectors, Tree], tuple[tuple[Vectors, Objective], Tree]]
    last: Callable[[Tree, Vectors, Tree], tuple[Objective, Tree]]


class Results(NamedTuple):
    """Sums over the microbatches.

    Attributes:
      objective: of all pieces.
      first: results of the first piece.
      layers: of the layers, in their order.
      last: of the last piece.
    """

    objective: Objective
    first: Tree
    layers: Tree
    last: Tree


def one_forward_one_backward(
    pieces: Pieces, layers: Tree, rest: Tree, rows: Tree, given: Tree = None, *, num_microbatches: int
) -> tuple[Results, tuple[Tree, Tree, Tree]]:
    """Value and gradient of a model in the stages of the mesh in context, of which there are at least two.

    Args:
      pieces: the model.
      layers: its parameters with a leading dim of layers, a multiple of the stages.
      rest: its other parameters, which every stage has.
      rows: arrays [batch, ...].
      given: arrays [batch, ...] that the objective is also differentiated by, e.g. an encoder's output. The pieces get
        `(rest, given)` of a microbatch in the place of `rest`.
      num_microbatches: M.

    Returns:
      The results, and the gradients of the objective by `layers`, by `rest` and by `given`.
    """
    whole, by_stage = PartitionSpec(), PartitionSpec("stage")
    results, (by_layers, by_rest, by_given) = jax.shard_map(
        partial(_run_stage, pieces),
        in_specs=(by_stage, whole, whole, whole),
        out_specs=(Results(whole, whole, by_stage, whole), (by_stage, whole, whole)),
        axis_names=manual_axes(),
        # Kernels inside have types of their own.
        check_vma=False,
    )(layers, rest, *jax.tree.map(partial(by_microbatch, count=num_microbatches), (rows, given)))
    return results, (by_layers, by_rest, jax.tree.map(in_batch, by_given))


class _Carry(NamedTuple):
    """What a stage keeps from tick to tick.

    Attributes:
      received: from the stage before: vectors.
      returned: from the stage behind: their gradient.
      inputs: vectors that wait for their backward pass, by microbatch modulo their number.
      gradients: of the layers, the rest, and, by microbatch, of what is given.
      results: so far.
    """

    received: Vectors
    returned: Vectors
    inputs: Float[Array, "slots rows length embed"]
    gradients: tuple[Tree, Tree, Tree]
    results: Results


def _run_stage(
    pieces: Pieces, layers: Tree, rest: Tree, rows: Tree, given: Tree
) -> tuple[Results, tuple[Tree, Tree, Tree]]:
    count = jax.tree.leaves(rows)[0].shape[0]
    stages, stage = lax.axis_size("stage"), lax.axis_index("stage")
    last = stages - 1

    def go_backward(gradients, x, gradient, results, microbatch):
        by_layers, by_rest, by_given = gradients
        own = _pick(given, microbatch)
        so_far = by_layers, (by_rest, jax.tree.map(jnp.zeros_like, own))
        (by_layers, (by_rest, by_own)), gradient, results = _backward(
            pieces, layers, (rest, own), _pick(rows, microbatch), so_far, x, gradient, results
        )
        by_given = jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, microbatch, 0), by_given, by_own)
        return (by_layers, by_rest, by_given), gradient, results

    def tick(carry: _Carry, time: Int[Array, ""]) -> tuple[_Carry, None]:
        forward, backward = time - stage, time - 2 * last + stage
        slots = carry.inputs.shape[0]
        inputs = lax.dynamic_update_index_in_dim(carry.inputs, carry.received, forward % slots, 0)
        # The last stage goes backward at once, which includes going forward.
        goes_forward = (forward >= 0) & (forward < count) & (stage < last)
        x = lax.cond(
            goes_forward,
            lambda x: _forward(pieces, layers, (rest, _pick(given, forward)), x, _pick(rows, forward)),
            lambda x: x,
            carry.received,
        )
        gradients, gradient, results = lax.cond(
            (backward >= 0) & (backward < count),
            go_backward,
            lambda gradients, x, gradient, results, microbatch: (gradients, gradient, results),
            carry.gradients,
            inputs[backward % slots],
            carry.returned,
            carry.results,
            backward,
        )
        received = lax.ppermute(x, "stage", [(i, i + 1) for i in range(last)])
        returned = lax.ppermute(gradient, "stage", [(i + 1, i) for i in range(last)])
        return _Carry(received, returned, inputs, gradients, results), None

    start = _start(pieces, layers, rest, rows, given, max(2 * stages - 3, 1))
    (*_, (layer_gradients, *whole_gradients), results), _ = lax.scan(
        tick, start, jnp.arange(num_ticks(count, stages, schedule="1f1b"))
    )
    total = partial(jax.tree.map, lambda a: lax.psum(a, "stage"))
    results = Results(total(results.objective), total(results.first), results.layers, total(results.last))
    return results, (layer_gradients, *total(whole_gradients))


def _forward(pieces: Pieces, layers: Tree, rest: Tree, x: Vectors, rows: Tree) -> Vectors:
    """A microbatch through the layers of a stage; the first stage makes its vectors itself."""
    x = lax.cond(_is_first(), lambda x: pieces.first(rest, rows)[0][0], lambda x: x, x)
    return pieces.layers(layers, rest, x, rows)[0][0]


def _backward(
    pieces: Pieces,
    layers: Tree,
    rest: Tree,
    rows: Tree,
    gradients: tuple[Tree, Tree],
    x: Vectors,
    gradient: Vectors,
    results: Results,
) -> tuple[tuple[Tree, Tree], Vectors, Results]:
    """A microbatch through the layers of a stage again, and back.

    Args:
      pieces: the model.
      layers: parameters of this stage's layers.
      rest: the other parameters, and what is given of the microbatch.
      rows: of the microbatch.
      gradients: of layers and rest so far.
      x: the stage's input; the first stage makes its own.
      gradient: by the stage's output; the last stage makes its own.
      results: so far.

    Returns:
      Gradients and results with this microbatch added, and between them the gradient by the stage's input.
    """
    layer_gradients, rest_gradients = gradients
    one = jnp.ones(())
    x = lax.cond(_is_first(), lambda x: pieces.first(rest, rows)[0][0], lambda x: x, x)
    (y, objective), pull, found = jax.vjp(lambda *given: pieces.layers(*given, rows), layers, rest, x, has_aux=True)

    def at_the_end(so_far, gradient):
        objective, pull, found = jax.vjp(lambda rest, y: pieces.last(rest, y, rows), rest, y, has_aux=True)
        by_rest, gradient = pull(one)
        return _add(so_far, (by_rest, objective, found)), gradient

    def at_the_beginning(so_far, gradient):
        (_, objective), pull, found = jax.vjp(lambda rest: pieces.first(rest, rows), rest, has_aux=True)
        return _add(so_far, (*pull((gradient, one)), objective, found))

    so_far = rest_gradients, results.objective + objective, results.last
    is_last = lax.axis_index("stage") == lax.axis_size("stage") - 1
    so_far, gradient = lax.cond(is_last, at_the_end, lambda *given: given, so_far, gradient)
    (rest_gradients, objective, ends) = so_far
    by_layers, by_rest, gradient = pull((gradient, one))
    so_far = _add(rest_gradients, by_rest), objective, results.first
    so_far = lax.cond(_is_first(), at_the_beginning, lambda so_far, _: so_far, so_far, gradient)
    rest_gradients, objective, begins = so_far
    results = Results(objective, begins, _add(results.layers, found), ends)
    return (_add(layer_gradients, by_layers), rest_gradients), gradient, results


def _start(pieces: Pieces, layers: Tree, rest: Tree, rows: Tree, given: Tree, slots: int) -> _Carry:
    """Nothing done yet."""
    both, rows = (rest, _pick(given, 0)), _pick(rows, 0)
    (x, objective), begins = jax.eval_shape(pieces.first, both, rows)
    _, found = jax.eval_shape(pieces.layers, layers, both, x, rows)
    _, ends = jax.eval_shape(pieces.last, both, x, rows)
    zeros = partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))
    inputs = jnp.zeros((slots, *x.shape), x.dtype)
    results = Results(objective, begins, found, ends)
    return _Carry(zeros(x), zeros(x), inputs, zeros((layers, rest, given)), zeros(results))


def _is_first() -> Array:
    return lax.axis_index("stage") == 0


def _pick(tree: Tree, index: Int[Array, ""] | int) -> Tree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)


def _add(total: Tree, new: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, new)
