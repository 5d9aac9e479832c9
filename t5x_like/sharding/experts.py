"""A mixture of experts on a mesh: every device routes its own tokens, and tokens and experts meet in an exchange.

The tokens are split over the batch's axes and `sequence`, the experts over `expert`, each expert over `tensor`, and
its weights' storage over `fsdp`. One `jax.shard_map` is manual over all of them: left automatic, XLA would gather all
tokens before it sorts them. Sums over the tokens go over all devices, so results do not depend on the mesh.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from t5x_like.errors import UserError
from t5x_like.kernels.dispatch import Rows, collect, of_tokens, sorted_rows, spread
from t5x_like.sharding.logical import automatic_axes, batch_axes, partition_spec

Compute = Callable[[Array, Int[Array, "experts"] | None], Array]
"""Runs a device's experts: on rows [rows, embed] sorted by expert with the number of each, or, without numbers, on as
many rows for each: [experts, rows, embed]. Rows beyond the numbers are zero, and stay so."""


def check_experts(num_experts: int | None, mesh: Mesh) -> None:
    """Refuses a mesh whose `expert` axis has no experts to split, or cannot split them evenly.

    Args:
      num_experts: `MoEConfig.num_experts`; None for a model without experts.
      mesh: the run's mesh.
    """
    shares = mesh.shape["expert"]
    if shares == 1:
        return
    if num_experts is None:
        raise UserError(
            f"MeshConfig.expert is {shares}, but the model has no experts: use 1 and give its devices to fsdp or data."
        )
    if num_experts % shares:
        fitting = max(n for n in range(1, shares) if num_experts % n == 0)
        raise UserError(
            f"MoEConfig.num_experts ({num_experts}) cannot be divided among MeshConfig.expert ({shares}): "
            f"{fitting} would do."
        )


def tokens_per_group(batch: int, length: int, group_size: int) -> int:
    """The largest number of tokens up to `group_size` that are an equal part of a sequence, or whole sequences.

    It depends on the batch alone, so that a mesh changes nothing.
    """
    if length >= group_size:
        return _largest_divisor(length, group_size)
    return length * _largest_divisor(batch, group_size // length)


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the mesh splits a mixture of experts.

    Attributes:
      tokens: axes that split the tokens.
      experts: number of devices that split the experts.
      splits_mlp: whether `tensor` splits each expert; its results are then partial sums.
    """

    tokens: tuple[str, ...] = ()
    experts: int = 1
    splits_mlp: bool = False


def on_each_device(
    function: Callable[..., tuple[Float[Array, "tokens embed"], Any]],
    tokens: tuple[Shaped[Array, "batch length ..."], ...],
    weights: dict[str, Float[Array, "experts ..."]],
    axes: dict[str, tuple[str, ...]],
    *,
    group: int = 1,
) -> tuple[Float[Array, "batch length embed"], Any]:
    """Runs `function(*tokens, weights, shares)` on every device's own tokens and experts.

    Args:
      function: gets tokens with batch and length flattened, the weights of the device's experts, and `Shares`; returns
        an output per token and sums over tokens.
      tokens: arrays that are split by token. Rows of zeros are added where the mesh does not divide the batch.
      weights: of the experts.
      axes: the logical axes of each weight.
      group: that many neighbouring tokens stay on one device.

    Returns:
      The output, and the sums over all tokens.
    """
    batch, length = tokens[0].shape[:2]
    flat = lambda arrays: tuple(a.reshape(-1, *a.shape[2:]) for a in arrays)
    automatic = automatic_axes()
    sizes = {axis: size for axis, size in automatic.items() if size > 1}
    specs = {name: partition_spec(axes[name], weights[name].shape, sizes) for name in weights}
    used = {axis for spec in specs.values() for axis in spec if axis}
    token_spec = _token_spec(length, group, sizes)
    token_axes = (*batch_axes(), *(("sequence",) if token_spec[1] else ()))
    shares = Shares(token_axes, sizes["expert"] if "expert" in used else 1, "tensor" in used)
    if not sizes:
        y, sums = function(*flat(tokens), weights, shares)
        return y.reshape(batch, length, -1), sums

    def local(tokens, weights):
        weights = {name: _local_weight(w, specs[name], axes[name], shares) for name, w in weights.items()}
        y, sums = function(*flat(tokens), weights, shares)
        if shares.splits_mlp:
            y = lax.psum(y, "tensor")
        return y.reshape(*tokens[0].shape[:2], -1), lax.psum(sums, token_axes) if token_axes else sums

    missing = _missing_rows(batch, length, group, math.prod(sizes[axis] for axis in batch_axes()))
    padded = tuple(jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in tokens)
    # All axes, also those of one device: beside an automatic one Mosaic kernels would refuse.
    y, sums = jax.shard_map(
        local, in_specs=(token_spec, specs), out_specs=(token_spec, PartitionSpec()), axis_names=set(automatic)
    )(padded, weights)
    return y[:batch], sums


def _missing_rows(batch: int, length: int, group: int, devices: int) -> int:
    """How many more rows the batch must have for each device to get equally many whole groups."""
    missing = -batch % (devices * max(1, group // length))
    if missing and batch % devices == 0 and length > 1:
        logging.warning(
            f"Mixture of experts: groups of {group} tokens are too few for {devices} devices, some of which idle. "
            f"A group_size of {batch * length // devices} would keep all busy."
        )
    return missing


def _token_spec(length: int, group: int, sizes: dict[str, int]) -> PartitionSpec:
    """Batch and length over the mesh; the length stays whole where a group of tokens would be cut."""
    share, rest = divmod(length, sizes.get("sequence", 1))
    whole = share == length or rest or share % group
    return PartitionSpec(batch_axes() or None, None if whole else "sequence")


def _local_weight(weight: Array, spec: PartitionSpec, axes: tuple[str, ...], shares: Shares) -> Array:
    """The weight of this device's experts, put together from its parts on `fsdp`.

    Declared as differing between devices first, so that its gradient is first reduced and scattered over `fsdp`, and
    then only this part is added up over the other axes.
    """
    unsplit = tuple(axis for axis in shares.tokens if axis not in spec)
    weight = lax.pcast(weight, unsplit, to="varying") if unsplit else weight
    for dim, axis in enumerate(spec):
        if axis == "fsdp":
            weight = lax.all_gather(weight, axis, axis=dim, tiled=True)
    if shares.splits_mlp and "expert" in axes and "mlp" not in axes:  # A bias on partial sums counts once.
        weight = jnp.where(lax.axis_index("tensor") == 0, weight, 0)
    return weight


def by_equal_rows(
    x: Float[Array, "tokens embed"],
    rows: Rows,
    row_weights: Float[Array, "rows"],
    compute: Compute,
    num_experts: int,
    shares: Shares,
) -> Float[Array, "tokens embed"]:
    """Experts with equally many rows each; with experts on several devices, two all-to-alls."""
    x, row_weights = _differing((x, row_weights), shares)
    sent = spread(x, rows).reshape(num_experts, -1, x.shape[1])
    if shares.experts > 1:
        sent = lax.all_to_all(sent, "expert", 0, 1, tiled=True)
    y = compute(sent, None)
    if shares.experts > 1:
        y = lax.all_to_all(y, "expert", 1, 0, tiled=True)
    return collect(_weighted(y.reshape(-1, x.shape[1]), row_weights), rows, len(x))


def by_gather(
    x: Float[Array, "tokens embed"],
    experts: Int[Array, "tokens choices"],
    weights: Float[Array, "tokens choices"],
    compute: Compute,
    num_experts: int,
    shares: Shares,
    buffer_factor: float | None,
) -> tuple[Float[Array, "tokens embed"], Int[Array, ""]]:
    """Every device sees the tokens of all, runs its own experts on theirs, and the results are added up.

    Args:
      x: this device's tokens.
      experts: of each; `num_experts` stands for none.
      weights: of the experts' outputs.
      compute: runs this device's experts.
      num_experts: on all devices.
      shares: how the mesh splits them.
      buffer_factor: see `DroplessConfig`.

    Returns:
      The weighted sum of the experts' outputs, and the number of assignments dropped by this device's experts.
    """
    num_rows = _buffer_rows(experts, num_experts, shares, buffer_factor)
    local = num_experts // shares.experts
    x, weights = _differing((x, weights), shares)
    if shares.experts > 1:
        x, experts, weights = (lax.all_gather(a, "expert", tiled=True) for a in (x, experts, weights))
        experts = experts - lax.axis_index("expert") * local
        experts = jnp.where(experts >= 0, experts, local)
    assignments, sizes, dropped = sorted_rows(experts.reshape(-1), local, num_rows)
    rows, row_weights = of_tokens(assignments, weights)
    y = compute(spread(x, rows), sizes)
    y = collect(_weighted(y, row_weights), rows, len(x))
    return (lax.psum_scatter(y, "expert", tiled=True) if shares.experts > 1 else y), dropped


def by_ragged_all_to_all(
    x: Float[Array, "tokens embed"],
    experts: Int[Array, "tokens choices"],
    weights: Float[Array, "tokens choices"],
    compute: Compute,
    num_experts: int,
    shares: Shares,
    buffer_factor: float | None,
) -> tuple[Float[Array, "tokens embed"], Int[Array, ""]]:
    """As `by_gather`, but every token's copies travel only to the devices that hold its experts, and back."""
    if shares.experts == 1:
        return by_gather(x, experts, weights, compute, num_experts, shares, buffer_factor)
    num_rows = _buffer_rows(experts, num_experts, shares, buffer_factor)
    local = num_experts // shares.experts
    x, weights = _differing((x, weights), shares)
    assignments, counts, _ = sorted_rows(experts.reshape(-1), num_experts, experts.size)
    rows, row_weights = of_tokens(assignments, weights)

    counts = lax.all_gather(counts, "expert").reshape(shares.experts, shares.experts, local)
    there = _plan(jnp.sum(counts, axis=2), num_rows)
    received = _exchange(spread(x, rows), there, num_rows)
    # What arrives is ordered by its device of origin, then by expert.
    arriving = counts[:, lax.axis_index("expert")].reshape(-1)
    expert = jnp.repeat(jnp.tile(jnp.arange(local), shares.experts), arriving, total_repeat_length=num_rows)
    expert = jnp.where(jnp.arange(num_rows) < jnp.sum(arriving), expert, local)
    by_expert, sizes, _ = sorted_rows(expert, local, num_rows)

    y = compute(spread(received, by_expert), sizes)
    back = _exchange(collect(y, by_expert, num_rows), there.reversed(), len(rows.token_of_row))
    y = collect(_weighted(back, row_weights), rows, len(x))
    return y, jnp.maximum(jnp.sum(arriving) - num_rows, 0)


def _buffer_rows(
    experts: Int[Array, "tokens choices"], num_experts: int, shares: Shares, buffer_factor: float | None
) -> int:
    """Rows for the tokens that the experts of one device get: for the worst case, or a multiple of the average."""
    tokens, choices = experts.shape
    worst = shares.experts * tokens * min(choices, num_experts // shares.experts)
    if shares.experts == 1 or buffer_factor is None:
        return tokens * choices if shares.experts == 1 else worst
    return min(worst, math.ceil(buffer_factor * tokens * choices))


def _differing(arrays: tuple[Array, ...], shares: Shares) -> tuple[Array, ...]:
    """Says that `tensor` may make a difference, so that gradients are added up over it per token, not per row."""
    return lax.pcast(arrays, "tensor", to="varying") if shares.splits_mlp else arrays


def _weighted(y: Float[Array, "rows embed"], row_weights: Float[Array, "rows"]) -> Float[Array, "rows embed"]:
    return (y * row_weights[:, None]).astype(y.dtype)


class _Plan(NamedTuple):
    """Who sends how many rows to whom, from where, to where: arrays [sender, receiver]."""

    sizes: Int[Array, "senders receivers"]
    sources: Int[Array, "senders receivers"]
    targets: Int[Array, "senders receivers"]

    def reversed(self) -> "_Plan":
        return _Plan(self.sizes.T, self.targets.T, self.sources.T)


def _plan(sizes: Int[Array, "senders receivers"], num_rows: int) -> _Plan:
    """Senders order their rows by receiver, receivers by sender; what goes beyond `num_rows` is not sent."""
    sources = jnp.cumsum(sizes, axis=1) - sizes
    ends = jnp.cumsum(sizes, axis=0)
    targets = jnp.minimum(ends - sizes, num_rows)
    return _Plan(jnp.minimum(ends, num_rows) - targets, sources, targets)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _exchange(x: Float[Array, "rows embed"], plan: _Plan, num_rows: int) -> Float[Array, "received embed"]:
    """Rows that this device receives, of `num_rows` places; the others are zero. Its gradient is the way back."""
    return lax.platform_dependent(
        x, plan, cpu=partial(_exchange_by_gather, num_rows), default=partial(_exchange_ragged, num_rows)
    )


def _exchange_forward(x, plan, num_rows):
    return _exchange(x, plan, num_rows), (plan, jnp.zeros((len(x), 0)))


def _exchange_backward(num_rows, residuals, dy):
    plan, like_x = residuals
    no_gradient = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)
    return _exchange(dy, plan.reversed(), len(like_x)), no_gradient


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _exchange_ragged(num_rows: int, x: Float[Array, "rows embed"], plan: _Plan) -> Float[Array, "received embed"]:
    me = lax.axis_index("expert")
    places = jnp.zeros_like(x, shape=(num_rows, x.shape[1]))
    return lax.ragged_all_to_all(
        x,
        places,
        plan.sources[me],
        plan.sizes[me],
        plan.targets[me],
        plan.sizes[:, me],
        axis_name="expert",
    )


def _exchange_by_gather(num_rows: int, x: Float[Array, "rows embed"], plan: _Plan) -> Float[Array, "received embed"]:
    """The same on CPUs, where XLA has no ragged all-to-all: everyone gets everything and takes out its own."""
    me = lax.axis_index("expert")
    everything = lax.all_gather(x, "expert")
    offset = jnp.arange(num_rows) - plan.targets[:, me, None]
    is_from = (offset >= 0) & (offset < plan.sizes[:, me, None])
    sender = jnp.argmax(is_from, axis=0)
    row = jnp.take_along_axis(plan.sources[:, me, None] + offset, sender[None], axis=0)[0]
    return jnp.where(jnp.any(is_from, axis=0)[:, None], everything[sender, jnp.clip(row, 0, len(x) - 1)], 0)
