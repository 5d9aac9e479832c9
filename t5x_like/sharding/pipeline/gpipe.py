"""Layers in stages: each device keeps some of them, and microbatches travel from stage to stage.

Written once for all stages: one `jax.shard_map` that is manual over the mesh axis `stage` and leaves every other axis
to XLA. GPipe (Huang et al. 2019); with `repeats`, the circular schedule of interleaved stages (Narayanan et al. 2021,
section 2.2), where stage s keeps the layers of turns s, s + S, s + 2 S, ...
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from t5x_like.sharding.logical import automatic_axes

Tree = Any
RunLayers = Callable[
    [Tree, Float[Array, "rows length embed"], Tree, Tree], tuple[Float[Array, "rows length embed"], Tree]
]
"""(layers stacked on a leading dim, vectors, what else belongs to the rows, what belongs to all) -> (vectors, results
stacked by layer)."""


def num_stages() -> int:
    """Stages of the mesh in context."""
    return automatic_axes().get("stage", 1)


def manual_axes() -> set[str]:
    """What a pipeline takes from XLA: the stages, and axes of one device, beside which Mosaic kernels would refuse."""
    return {axis for axis, size in automatic_axes().items() if axis == "stage" or size == 1}


def bubble(num_microbatches: int, stages: int, repeats: int = 1) -> float:
    """The share of the time that a stage waits: (S - 1) / (M R + S - 1)."""
    return (stages - 1) / (num_microbatches * repeats + stages - 1)


def num_ticks(num_microbatches: int, stages: int, repeats: int = 1, schedule: str = "gpipe") -> int:
    """How often every stage sends to the next one in a pass, and as often back."""
    return num_microbatches * repeats + (stages - 1) * (2 if schedule == "1f1b" else 1)


def pipelined(
    run: RunLayers,
    layers: Tree,
    x: Float[Array, "batch length embed"],
    rows: Tree,
    shared: Tree,
    *,
    num_microbatches: int,
    repeats: int = 1,
) -> tuple[Float[Array, "batch length embed"], Tree]:
    """Runs layers over the stages of the mesh in context.

    A stage that has no microbatch to work on skips its layers. Microbatch m has the rows m, m + M, m + 2 M, ... of the
    batch, so that every device keeps its rows.

    Args:
      run: some neighbouring layers on a microbatch.
      layers: arrays with a leading dim of layers, a multiple of stages x repeats.
      x: the vectors.
      rows: what else belongs to the rows of the batch: arrays [batch, ...].
      shared: arrays that all layers and rows have in common.
      num_microbatches: M; at least the number of stages where `repeats` is above 1.
      repeats: turns that a microbatch makes through all stages.

    Returns:
      The vectors behind the last layer, and each layer's results as means over the microbatches.
    """
    stages, count = num_stages(), num_microbatches
    x, rows = jax.tree.map(lambda a: by_microbatch(a, count), (x, rows))
    turns = jax.tree.map(lambda a: _by_turn(a, stages, repeats), layers)
    by_stage, whole = PartitionSpec(None, "stage"), PartitionSpec()
    outputs, results = jax.shard_map(
        lambda *args: _run_stage(run, *args, repeats=repeats),
        in_specs=(by_stage, whole, whole, whole),
        out_specs=(PartitionSpec("stage"), by_stage),
        axis_names=manual_axes(),
        # Kernels inside have types of their own.
        check_vma=False,
    )(turns, x, rows, shared)
    # Only what the last stage has collected counts.
    merge = lambda a: a.reshape(-1, *a.shape[3:])
    return in_batch(outputs[-count:]), jax.tree.map(merge, results)


def by_microbatch(array: Shaped[Array, "batch ..."], count: int) -> Shaped[Array, "count rows ..."]:
    """Microbatch m has the rows m, m + count, m + 2 count, ... of the batch."""
    return jnp.swapaxes(array.reshape(array.shape[0] // count, count, *array.shape[1:]), 0, 1)


def in_batch(array: Shaped[Array, "count rows ..."]) -> Shaped[Array, "batch ..."]:
    """Inverse of `by_microbatch`."""
    return jnp.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:])


def _by_turn(a: Array, stages: int, repeats: int) -> Array:
    """[layers, ...] -> [repeats, stages, layers of a turn, ...]."""
    return a.reshape(repeats, stages, a.shape[0] // (stages * repeats), *a.shape[1:])


def _run_stage(run: RunLayers, turns: Tree, x: Array, rows: Tree, shared: Tree, *, repeats: int) -> tuple[Array, Tree]:
    """What one stage does: at each tick a microbatch, if there is one, then everything moves to the next stage."""
    count, stages = x.shape[0], lax.axis_size("stage")
    stage = lax.axis_index("stage")
    pick = lambda tree, index: jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)

    def work(job: Int[Array, ""], received: Array) -> tuple[Array, Tree]:
        """The turn and the microbatch of a job, from 0 to repeats * count - 1."""
        turn, microbatch = job // count, job % count
        layers = jax.tree.map(lambda a: a[0], pick(turns, turn))
        return run(layers, received, pick(rows, microbatch), shared)

    one = lambda tree: jax.tree.map(lambda a: a[0], tree)
    shapes = jax.eval_shape(lambda turns, x, rows: run(one(one(turns)), x[0], one(rows), shared), turns, x, rows)[1]
    zeros = lambda *lead: jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), shapes)

    def tick(carry, time):
        received, waiting, outputs, totals = carry
        job = time - stage
        turn, microbatch = job // count, job % count
        # The first stage begins each turn: the first one from x, the others from what has come round.
        begins = jnp.where(turn == 0, pick(x, microbatch), pick(waiting, microbatch))
        given = jnp.where(stage == 0, begins, received)
        active = (job >= 0) & (job < repeats * count)
        idle = lambda job, given: (given, zeros())
        y, results = lax.cond(active, work, idle, job, given)
        add = lambda total, new: total.at[turn].add(jnp.where(active, new, 0) / count)
        totals = jax.tree.map(add, totals, results)
        done = active & (turn == repeats - 1)
        outputs = outputs.at[microbatch].set(jnp.where(done, y, outputs[microbatch]))
        received = lax.ppermute(y, "stage", [(i, (i + 1) % stages) for i in range(stages)])
        # What reaches the first stage is from the last one, whose job is `stages - 1` behind.
        came = (time - (stages - 1)) % count
        waiting = waiting.at[came].set(jnp.where(time >= stages - 1, received, waiting[came]))
        return (received, waiting, outputs, totals), None

    empty = jnp.zeros(x.shape, x.dtype)
    carry = (empty[0], empty, empty, zeros(repeats))
    (_, _, outputs, totals), _ = lax.scan(tick, carry, jnp.arange(num_ticks(count, stages, repeats)))
    return outputs, jax.tree.map(lambda a: a[:, None], totals)


def padding(num_layers: int, stages: int, repeats: int) -> int:
    """Layers to add, which do nothing, so that all turns have equally many."""
    unit = stages * repeats
    return math.ceil(num_layers / unit) * unit - num_layers


def padded(layers: Tree, count: int) -> Tree:
    """Arrays of layers with `count` more of them, copies of the first."""
    more = lambda a: jnp.concatenate([a, jnp.broadcast_to(a[:1], (count, *a.shape[1:]))]) if count else a
    return jax.tree.map(more, layers)
