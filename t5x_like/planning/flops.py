"""Counts the FLOPs of a traced program: what the devices do, recomputation included."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """FLOPs of the matrix products in a program, loops times their turns, over all devices.

    Kernels count what their cost estimate says. A loop whose length depends on data counts the mean over the turns of
    the loop around it (a causal mask's), a condition its most expensive branch.

    Args:
      jaxpr: of `jax.make_jaxpr` or `jitted.trace(...).jaxpr`.
    """
    return _count(jaxpr, 1.0)


def _count(jaxpr: ClosedJaxpr | Jaxpr, outer: float) -> float:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of_equation(equation, outer) for equation in inner.eqns)


def _of_equation(equation: Any, outer: float) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    if name.startswith("ragged_dot"):
        rows, depth = equation.invars[0].aval.shape[-2:]
        return 2.0 * rows * depth * equation.invars[1].aval.shape[-1]
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        return float(estimate.flops) if estimate is not None else 0.0
    if name == "scan":
        return params["length"] * _count(params["jaxpr"], float(params["length"]))
    if name == "while":
        return (outer + 1) / 2 * _count(params["body_jaxpr"], outer)
    if name == "cond":
        return max(_count(branch, outer) for branch in params["branches"])
    times = 1
    if name == "shard_map":
        mesh = params["mesh"]
        times = math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(_count(inner, outer) for inner in jaxprs_in_params(params))
