"""What the Mosaic GPU kernels share: warpgroups, blocks that come through barriers, and the logits of a tile."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.logits import attention_logits
from t5x_like.kernels.attention.masks import position_rules
from t5x_like.kernels.attention.mosaic_products import interpretation
from t5x_like.kernels.attention.prepared import Inputs, Plan
from t5x_like.kernels.attention.triton_tiles import Visits, visit_all

COMPUTE = 2
"""Warpgroups that compute; the one after them copies."""


def launch(body: Callable, inputs: Inputs, out_type: Any, scratch: Any, grid: tuple[int, int, int], interpreted: bool):
    """Runs body(inputs, *outputs, scratch) on a grid of heads, blocks and batch, with all warpgroups in a program."""
    arrays, tree = jax.tree.flatten(inputs)
    run = plgpu.kernel(
        lambda *refs: body(tree.unflatten(refs[: len(arrays)]), *refs[len(arrays) :]),
        out_type=out_type,
        scratch_types=[scratch],
        grid=grid,
        grid_names=("head", "block", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpretation(interpreted),
    )
    return run(*arrays)


def split_work(compute: Any, copy: Any):
    """Runs compute(warpgroup) on the warpgroups that compute, and copy() on the other one."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        copy()


class Stream(NamedTuple):
    """Arrays whose blocks come to shared memory together, into one of several places.

    Attributes:
      places: a block of each array for each place.
      here: barriers that say, by place, that the copies have come; they expect one arrival for each array.
      free: barriers that say that every warpgroup has done with a place.
    """

    places: tuple[Any, ...]
    here: Any
    free: Any

    @property
    def stages(self) -> int:
        return self.places[0].shape[0]

    def slot(self, n: Array) -> Int[Array, ""]:
        return lax.rem(n, jnp.int32(self.stages))

    def bring(self, n: Array, *blocks: Any):
        """Copies the n-th blocks, as soon as there is a place."""
        slot = self.slot(n)
        pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        for block, places in zip(blocks, self.places, strict=True):
            plgpu.copy_gmem_to_smem(block, places.at[slot], self.here.at[slot])

    def drain(self, n: Array):
        """Waits until the last of n blocks are done with: a barrier may not go while something is still to arrive."""
        for slot in range(self.stages):
            pl.when(n > slot)(lambda slot=slot: plgpu.barrier_wait(self.free.at[slot]))

    def wait(self, n: Array) -> tuple[Any, ...]:
        """The n-th blocks, once they are here."""
        slot = self.slot(n)
        plgpu.barrier_wait(self.here.at[slot])
        return tuple(places.at[slot] for places in self.places)

    def done(self, n: Array):
        plgpu.barrier_arrive(self.free.at[self.slot(n)])


def stream(stages: int, *blocks: tuple[tuple[int, ...], Any]) -> Stream:
    """The scratch of a stream of arrays, given by the shape and dtype of their blocks."""
    return Stream(
        tuple(plgpu.SMEM((stages, *shape), dtype) for shape, dtype in blocks),
        here=plgpu.Barrier(num_arrivals=len(blocks), num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    )


def visits_of(inputs: Inputs, block: Array) -> Visits:
    """The blocks of the other side with work for a block."""
    return Visits(*(inputs.context.visits[0, block, field] for field in range(6)))


def query_block(inputs: Inputs, group: int) -> tuple[tuple[Array, Array, Array], Array, Visits]:
    """Where a program of the query blocks is: batch, query head and its key head; its block; that block's visits."""
    head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    # The last queries first: under a causal mask they have the most work.
    i = lax.axis_size("block") - 1 - block
    return (batch, head, lax.div(head, jnp.int32(group))), i, visits_of(inputs, i)


def copy_keys(inputs: Inputs, visits: Visits, batch: Array, kv_head: Array, keys: Stream, values: Stream):
    """Brings all blocks of keys and values with work."""
    length = keys.places[0].shape[1]

    def step(n, j, plain):
        at = (batch, pl.ds(j * length, length), kv_head)
        keys.bring(n, inputs.k.at[at])
        values.bring(n, inputs.v.at[at])
        return n + 1

    num_blocks = visit_all(visits, step, jnp.int32(0))
    keys.drain(num_blocks)
    values.drain(num_blocks)


class Tile(NamedTuple):
    """Where a tile of scores is.

    Attributes:
      q_start: position of its first query.
      kv_start: of its first key.
      num_keys: keys from there on that are no padding.
      keys_are_rows: and queries columns.
    """

    q_start: Int[Array, ""]
    kv_start: Int[Array, ""]
    num_keys: Int[Array, ""]
    keys_are_rows: bool = False


def tile_logits(plan: Plan, tile: Tile, scores: Float[Array, "x y"], plain: bool) -> Float[Array, "x y"]:
    """Logits from the products of queries and keys; `plain` as in `triton_tiles.Visits`."""
    mask = None
    if not plain:
        key = lax.broadcasted_iota(jnp.int32, scores.shape, 0 if tile.keys_are_rows else 1)
        query = tile.q_start + lax.broadcasted_iota(jnp.int32, scores.shape, 1 if tile.keys_are_rows else 0)
        rules = position_rules(plan.mask, query, tile.kv_start + key)
        mask = functools.reduce(jnp.logical_and, [*rules, key < tile.num_keys])
    return attention_logits(scores, mask, scale=plan.scale, soft_cap=plan.soft_cap)


def spread(vector: Float[Array, "x"], shape: tuple[int, int], axis: int = 0) -> Float[Array, "rows columns"]:
    """One number for each row (axis 0) or column (axis 1) of `shape`."""
    return lax.broadcast_in_dim(vector, shape, (axis,))
