"""What the Mosaic GPU kernels share: warpgroups, blocks that come through barriers, and the logits of a tile."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from t5x_like.kernels.attention.logits import attention_logits
from t5x_like.kernels.attention.masks import position_rules
from t5x_like.kernels.attention.triton_tiles import Plan

COMPUTE = 2
"""Warpgroups that compute; the one after them copies."""


def compiler_params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


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


def stream_barriers(num_arrays: int, stages: int) -> tuple[plgpu.Barrier, plgpu.Barrier]:
    """`Stream.here` and `Stream.free`."""
    return (
        plgpu.Barrier(num_arrivals=num_arrays, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    )


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
