"""A grouped matrix product and its two derivatives, which are grouped products too, as one differentiable function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int


class Products(NamedTuple):
    """What a backend computes. All take a static, hashable plan first and `group_sizes` last, beside these arrays.

    Rows beyond the sum of `group_sizes` count as absent.

    Attributes:
      forward: (lhs [m k], rhs [g k n]) -> [m n], each row times the matrix of its group, zero in absent rows.
      dlhs: (dout [m n], rhs [g k n]) -> [m k], the same with transposed matrices.
      drhs: (lhs [m k], dout [m n]) -> [g k n], per group the sum over its rows; zero in an empty group.
    """

    forward: Callable[[Any, Array, Array, Array], Array]
    dlhs: Callable[[Any, Array, Array, Array], Array]
    drhs: Callable[[Any, Array, Array, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(
    products: Products, plan: Any, lhs: Float[Array, "m k"], rhs: Float[Array, "g k n"], group_sizes: Int[Array, "g"]
) -> Float[Array, "m n"]:
    """The forward product, whose gradients are the other two."""
    return products.forward(plan, lhs, rhs, group_sizes)


def _forward(products, plan, lhs, rhs, group_sizes):
    return products.forward(plan, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(products, plan, saved, dout):
    lhs, rhs, group_sizes = saved
    return products.dlhs(plan, dout, rhs, group_sizes), products.drhs(plan, lhs, dout, group_sizes), None


differentiable.defvjp(_forward, _backward)
