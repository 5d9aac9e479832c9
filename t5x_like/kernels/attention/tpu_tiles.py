"""What the TPU kernels compute on a tile of scores: logits with mask and bias, and the gradient of the bias.

Tiles of scores have keys as rows and queries as columns: what belongs to a query (maximum, sum, log-sum-exp, position)
is then one row, 32 bits per query in memory, and is reduced and spread over rows, which costs no lane shuffles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from t5x_like.kernels.attention.biases import alibi, relative_bias
from t5x_like.kernels.attention.block_sizes import LANES, BlockSizes
from t5x_like.kernels.attention.logits import attention_logits
from t5x_like.kernels.attention.masks import position_rules, segment_rules
from t5x_like.kernels.attention.prepared import Plan
from t5x_like.kernels.attention.tpu_specs import SUBLANES, Context


class Step(NamedTuple):
    """One grid step.

    Attributes:
      block: its key block.
      active: whether it has work.
      plain: whether no score of it needs the mask, and the relative bias is one number in all of it.
      q_start: position of the first query, unless positions are given.
      kv_start: of the first key.
    """

    block: Int[Array, ""]
    active: Bool[Array, ""]
    plain: Bool[Array, ""]
    q_start: Int[Array, ""]
    kv_start: Int[Array, ""]


def make_step(plan: Plan, sizes: BlockSizes, span: tuple, block: Array, i: Array, offsets_ref) -> Step:
    """The step of query block i and key block `block`; `span` is (first, end, full_first, full_end)."""
    _, end, full_first, full_end = span
    q_start, kv_start = offsets_ref[0] + i * sizes.q, offsets_ref[1] + block * sizes.kv
    plain = (block >= full_first) & (block < full_end)
    if plan.relative_bias is not None:
        plain &= _is_far(plan, sizes, q_start, kv_start)
    return Step(block, block < end, plain, q_start, kv_start)


def _is_far(plan: Plan, sizes: BlockSizes, q_start: Array, kv_start: Array) -> Bool[Array, ""]:
    """Whether the relative bias is one number in the whole block."""
    ahead = q_start - kv_start
    limit = plan.reach
    return (ahead - sizes.kv >= limit) | (ahead + sizes.q <= -limit)


def _reach(plan: Plan, sizes: BlockSizes) -> int:
    """Half the length of the strip: a tile anywhere, moved to where the bias is constant, must lie in it."""
    return -(-(plan.reach + sizes.compute + sizes.q) // LANES) * LANES


def make_strip(
    plan: Plan, sizes: BlockSizes, table: Float[Array, "heads num_buckets"]
) -> Float[Array, "heads 1 two_reach"]:
    """The relative bias at each query position minus key position from -reach to reach - 1."""
    half = _reach(plan, sizes)
    return relative_bias(plan.relative_bias, table, -jnp.arange(-half, half))[:, None]


def _strip_start(plan: Plan, sizes: BlockSizes, ahead: Array) -> Int[Array, ""]:
    """Where in the strip a tile begins, whose first query is `ahead` of its first key."""
    limit = plan.reach
    ahead = jnp.clip(ahead, -(limit + sizes.q), limit + sizes.compute)
    return ahead - sizes.compute + _reach(plan, sizes)


def _bias_tile(plan: Plan, sizes: BlockSizes, strip: Float[Array, "1 x"], ahead: Array) -> Float[Array, "compute q"]:
    """The relative bias of a tile: its diagonals are constant, so row r is the first one, moved by r.

    The steps of `_diagonal_sums` backwards: 8 rows, moved by 0 to 7, then each time as many again. (A roll that moves
    each row by its own index is a single instruction, but not on v4.)
    """
    width = sizes.compute + sizes.q
    start = _strip_start(plan, sizes, ahead)
    strip = jnp.broadcast_to(strip, (SUBLANES, strip.shape[1]))
    first = pltpu.roll(strip, strip.shape[1] - start, 1)[:, :width]
    index = lax.broadcasted_iota(jnp.int32, first.shape, 0)
    for bit in (1, 2, 4):
        first = jnp.where((index & bit) != 0, pltpu.roll(first, bit, 1), first)
    odd = sizes.compute // (sizes.compute & -sizes.compute)  # what is left without factors of two
    moved = [pltpu.roll(first, row, 1) for row in range(SUBLANES, odd * SUBLANES, SUBLANES)]
    tile = jnp.concatenate([first, *moved])
    while tile.shape[0] < sizes.compute:
        tile = jnp.concatenate([tile, pltpu.roll(tile, tile.shape[0], 1)])
    return tile[:, sizes.compute :]


def _diagonal_sums(plan: Plan, sizes: BlockSizes, tile: Float[Array, "compute q"], ahead: Array) -> Float[Array, "8 x"]:
    """The gradient of the strip, given that of a tile: sums over its diagonals, left to be added over 8 rows.

    Row r has to move left by r. Halves of the rows are moved and added to the others, until 8 are left.
    """
    rows, width = sizes.compute, sizes.compute + sizes.q
    tile = jnp.concatenate([jnp.zeros((rows, rows), tile.dtype), tile], axis=1)
    while rows % (2 * SUBLANES) == 0:
        rows //= 2
        tile = tile[:rows] + pltpu.roll(tile[rows:], width - rows, 1)
    total = tile[:SUBLANES]
    for row in range(SUBLANES, rows, SUBLANES):
        total += pltpu.roll(tile[row : row + SUBLANES], width - row, 1)
    index = lax.broadcasted_iota(jnp.int32, total.shape, 0)
    for bit in (4, 2, 1):
        total = jnp.where((index & bit) != 0, pltpu.roll(total, width - bit, 1), total)
    full = 2 * _reach(plan, sizes)
    total = jnp.concatenate([total, jnp.zeros((SUBLANES, full - width), total.dtype)], axis=1)
    return pltpu.roll(total, _strip_start(plan, sizes, ahead), 1)


def strip_gradient(
    plan: Plan, sizes: BlockSizes, dlogits: Float[Array, "compute q"], step: Step, at: int, plain: bool
) -> Float[Array, "8 two_reach"]:
    """What a tile adds to the gradient of the strip, to be summed over the 8 rows."""
    ahead = step.q_start - step.kv_start - at
    if not plain:
        return _diagonal_sums(plan, sizes, dlogits, ahead)
    shape = (SUBLANES, 2 * _reach(plan, sizes))
    end = jnp.where(ahead > 0, shape[1] - 1, 0)
    here = (lax.broadcasted_iota(jnp.int32, shape, 0) == 0) & (lax.broadcasted_iota(jnp.int32, shape, 1) == end)
    return jnp.where(here, dlogits.sum(axis=0, keepdims=True).sum(axis=1, keepdims=True), 0)


def tile_logits(
    plan: Plan,
    sizes: BlockSizes,
    context: Context,
    head: Array,
    step: Step,
    at: int,
    products: Float[Array, "compute q"],
    plain: bool,
) -> Float[Array, "compute q"]:
    """The logits of keys at to at + compute of a step's block; `plain`: it needs no mask and is far."""
    q_positions, kv_positions = _positions(plan, context, step, at, products.shape)
    mask = None if plain else _mask(plan, context, q_positions, kv_positions, at, products.shape)
    bias = None
    if plan.relative_bias is not None:
        ahead = step.q_start - step.kv_start - at
        if plain:  # the ends of the strip are the two constants
            bias = jnp.where(ahead > 0, context.strip[:, -1:], context.strip[:, :1])
        else:
            bias = _bias_tile(plan, sizes, context.strip[...], ahead)
    if context.slopes is not None:
        linear = alibi(context.slopes[head], kv_positions - q_positions)
        bias = linear if bias is None else bias + linear
    return attention_logits(products, mask, bias, scale=plan.scale, soft_cap=plan.soft_cap)


def _positions(plan, context, step, at, shape) -> tuple[Int[Array, "1 q"], Int[Array, "compute 1"]]:
    if plan.given_positions:
        return context.q_rows[0:1], _column(context.kv_rows, at, shape[0], 0)
    q = step.q_start + lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    return q, step.kv_start + at + lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)


def _column(rows, at: int, length: int, index: int) -> Int[Array, "length 1"]:
    """One of 8 rows, turned: keys run along the rows of a tile."""
    numbers = pltpu.bitcast(rows[:, at : at + length], jnp.float32)
    return pltpu.bitcast(jnp.transpose(numbers), jnp.int32)[:, index : index + 1]


def _mask(plan, context, q_positions, kv_positions, at, shape) -> Bool[Array, "compute q"] | None:
    rules = position_rules(plan.mask, q_positions, kv_positions)
    if context.q_rows is not None:
        rules += segment_rules(context.q_rows[1:2], _column(context.kv_rows, at, shape[0], 1))
    if not rules:
        return None
    result = jnp.broadcast_to(rules[0], shape)
    for rule in rules[1:]:
        result &= rule
    return result
