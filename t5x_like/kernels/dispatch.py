"""Which token goes into which row of an expert's input: index arithmetic on one device, and moves along it.

A mixture of experts copies tokens into rows ordered by expert, multiplies, and adds the rows up per token again. Both
moves are gathers here, and so are their gradients: a scatter-add is slow on TPUs, and on GPUs its order of additions
changes from run to run.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num


class Rows(NamedTuple):
    """Places of tokens among rows, said both ways round; an index out of range stands for none.

    Attributes:
      token_of_row: the token that a row holds.
      rows_of_token: the rows that hold a token; None where a token may be in any number of rows.
    """

    token_of_row: Int[Array, "rows"]
    rows_of_token: Int[Array, "tokens choices"] | None


def spread(x: Num[Array, "tokens embed"], rows: Rows) -> Num[Array, "rows embed"]:
    """Copies every token into its rows; empty rows are zero."""
    if rows.rows_of_token is None:
        return _take(x, rows.token_of_row)
    return _move(x, *rows, False)


def collect(y: Num[Array, "rows embed"], rows: Rows, num_tokens: int) -> Num[Array, "tokens embed"]:
    """Adds up the rows of every token; the transpose of `spread`."""
    if rows.rows_of_token is None:
        return jnp.zeros((num_tokens, y.shape[1]), y.dtype).at[rows.token_of_row].add(y, mode="drop")
    return _move(y, *rows, True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _move(x, token_of_row, rows_of_token, back):
    """`spread`, or `collect` if `back`; each is the other's gradient."""
    return jnp.sum(_take(x, rows_of_token), axis=1) if back else _take(x, token_of_row)


def _move_forward(x, token_of_row, rows_of_token, back):
    return _move(x, token_of_row, rows_of_token, back), (token_of_row, rows_of_token)


def _move_backward(back, places, dy):
    no_gradient = (np.zeros(place.shape, jax.dtypes.float0) for place in places)
    return _move(dy, *places, not back), *no_gradient


_move.defvjp(_move_forward, _move_backward)


def _take(x, index):
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


class Ranking(NamedTuple):
    """Assignments of tokens to experts, ordered by expert and among equals as they came.

    Attributes:
      order: the assignments in this order; those to no expert are last.
      place: where each assignment stands in it.
      counts: assignments per expert.
    """

    order: Int[Array, "assignments"]
    place: Int[Array, "assignments"]
    counts: Int[Array, "experts"]


def rank(experts: Int[Array, "assignments"], num_experts: int) -> Ranking:
    """Orders assignments by expert; `num_experts` and above stand for none."""
    order = jnp.argsort(experts, stable=True)
    counts = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Ranking(order, jnp.argsort(order), counts)


def sorted_rows(
    experts: Int[Array, "assignments"], num_experts: int, num_rows: int
) -> tuple[Rows, Int[Array, "experts"], Int[Array, ""]]:
    """One row per assignment, ordered by expert: what a grouped matrix product takes.

    Args:
      experts: the expert of each assignment; `num_experts` and above stand for none.
      num_experts: number of experts.
      num_rows: rows there are; what does not fit is dropped.

    Returns:
      The rows, whose "tokens" are the assignments; how many there are of each expert; how many were dropped.
    """
    order, place, counts = rank(experts, num_experts)
    ends = jnp.minimum(jnp.cumsum(counts), num_rows)
    order = jnp.where(jnp.arange(num_rows) < ends[-1], jnp.resize(order, num_rows), len(experts))
    place = jnp.where(place < ends[-1], place, num_rows)
    return Rows(order, place[:, None]), jnp.diff(ends, prepend=0), jnp.sum(counts) - ends[-1]


def capacity_rows(
    experts: Int[Array, "groups tokens choices"], num_experts: int, capacity: int
) -> tuple[Rows, Int[Array, ""]]:
    """`capacity` rows of each expert for each group of tokens: first come, first served (GShard; Switch Transformer).

    All first choices of a group's tokens come before all second choices, as in T5X. Rows are ordered by expert, then
    group.

    Args:
      experts: the experts of each token; `num_experts` and above stand for none.
      num_experts: number of experts.
      capacity: rows of an expert for a group.

    Returns:
      The rows, whose "tokens" are the assignments in the order of `experts`; how many assignments were dropped.
    """
    groups, tokens, choices = experts.shape
    by_choice = jnp.swapaxes(experts, 1, 2).reshape(groups, -1)
    order, place, counts = jax.vmap(lambda experts: rank(experts, num_experts))(by_choice)
    starts = jnp.cumsum(counts, axis=1) - counts
    group = jnp.arange(groups)

    slot = jnp.arange(capacity)
    source = jnp.minimum(starts[..., None] + slot, tokens * choices - 1)
    by_choice_index = order[group[:, None, None], source]
    assignment = (group[:, None, None] * tokens + by_choice_index % tokens) * choices + by_choice_index // tokens
    assignment = jnp.where(slot < counts[..., None], assignment, experts.size)

    expert = jnp.minimum(by_choice, num_experts - 1)
    position = place - jnp.take_along_axis(starts, expert, axis=1)
    row = (expert * groups + group[:, None]) * capacity + position
    row = jnp.where((by_choice < num_experts) & (position < capacity), row, num_experts * groups * capacity)
    row = jnp.swapaxes(row.reshape(groups, choices, tokens), 1, 2)
    dropped = jnp.sum(jnp.maximum(counts - capacity, 0))
    return Rows(jnp.swapaxes(assignment, 0, 1).reshape(-1), row.reshape(-1, 1)), dropped


def chosen_rows(scores: Float[Array, "groups tokens experts"], capacity: int) -> tuple[Rows, Float[Array, "rows"]]:
    """The `capacity` tokens of each group that an expert scores highest (expert choice, Zhou et al. 2022, section 3.2).

    Args:
      scores: of each token with each expert; 0 or less: not to be chosen.
      capacity: tokens that an expert takes from a group.

    Returns:
      The rows, ordered by expert, then group; the score of each, 0 where it is empty.
    """
    groups, tokens, _ = scores.shape
    best, token = jax.lax.top_k(jnp.swapaxes(scores, 1, 2), capacity)
    token = jnp.where(best > 0, token + tokens * jnp.arange(groups)[:, None, None], groups * tokens)
    by_expert = lambda values: jnp.swapaxes(values, 0, 1).reshape(-1)
    return Rows(by_expert(token), None), by_expert(jnp.maximum(best, 0))


def of_tokens(assignments: Rows, weights: Float[Array, "tokens choices"]) -> tuple[Rows, Float[Array, "rows"]]:
    """From rows of assignments to rows of tokens, of which each has several assignments, and the weight of each row."""
    rows = Rows(assignments.token_of_row // weights.shape[1], assignments.rows_of_token.reshape(weights.shape))
    return rows, spread(weights.reshape(-1, 1), assignments)[:, 0]
