"""Rematerialisation: what of the forward pass is kept for the backward pass."""

from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal["none", "full", "dots", "names", "offload"]
"""See `StackConfig.remat`."""

NAMED_TENSORS = ("query", "key", "value", "attention", "mlp", "gate")
"""What a block names with `checkpoint_name`, in the order it is computed; the kernels name `attention` themselves."""

ELEMENTWISE = frozenset(
    {
        "abs",
        "add",
        "add_any",
        "broadcast_in_dim",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "cos",
        "div",
        "erf",
        "erfc",
        "exp",
        "exp2",
        "expand_dims",
        "expm1",
        "floor",
        "integer_pow",
        "log",
        "log1p",
        "logistic",
        "max",
        "min",
        "mul",
        "neg",
        "polynomial",
        "pow",
        "reshape",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sqrt",
        "square",
        "squeeze",
        "sub",
        "tanh",
    }
)
"""Primitives whose results take longer to write and to read again than to compute again."""


def checkpointed(function: Callable, remat: Remat, names: tuple[str, ...], *, in_scan: bool) -> Callable:
    """`function` with a policy of `StackConfig.remat`; `names` are its `remat_names`."""
    policy: Any = None
    policies = jax.checkpoint_policies
    if remat == "none":
        if not in_scan:  # Outside of a loop XLA merges what is computed twice.
            return function
        policy = lambda primitive, *_, **__: primitive.name not in ELEMENTWISE
    elif remat == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    elif remat == "names":
        policy = policies.save_only_these_names(*names)
    elif remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)
