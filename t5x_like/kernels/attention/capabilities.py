"""What each backend cannot do, or "auto" should not ask of it, in words that follow "because"."""

import jax.numpy as jnp

from t5x_like.kernels.attention.call import AttentionCall
from t5x_like.kernels.target import GPUS, HOPPER, target_chip, target_platform

AUTO_MAX_SCORES = 2**26
"""Logits (batch * heads * q_length * kv_length) above which "auto" does not take the reference: 256 MiB in float32."""

CPU_MAX_LENGTH = 512
"""Queries and keys above which "auto" does not take the reference on CPU: at 1024 the chunked backend needs 1/2 to 2/3
of its time, at 2048 a third."""

MAX_HEAD_DIM = 256
"""Of the Pallas kernels."""

TPU_MAX_DISTANCE = 4096
TRITON_MAX_DISTANCE = 1024
"""The backward pass keeps a number per query, head and distance."""


def reference_refusal(call: AttentionCall) -> str | None:
    return None


def reference_reserve(call: AttentionCall) -> str | None:
    batch, num_heads, q_length, kv_length = call.scores
    scores = batch * num_heads * q_length * kv_length
    if call.bias is not None:  # which is itself as large as the scores
        return None
    if scores > AUTO_MAX_SCORES:
        return f"it would keep {scores} scores, more than {AUTO_MAX_SCORES}"
    if target_chip() == "cpu" and min(q_length, kv_length) > CPU_MAX_LENGTH:
        return f"on CPU it is slow above {CPU_MAX_LENGTH} tokens"
    return None


def chunked_refusal(call: AttentionCall) -> str | None:
    return "it has no general bias" if call.bias is not None else None


def tpu_refusal(call: AttentionCall) -> str | None:
    return _first(
        {
            f"it runs on TPU, and this program is for {target_chip()}": target_platform() != "tpu",
            **_kernel_limits(call, dtypes=("bfloat16", "float32")),
            f"its relative bias reaches {TPU_MAX_DISTANCE} positions at most": (
                call.relative_bias is not None and call.relative_bias.max_distance > TPU_MAX_DISTANCE
            ),
        }
    )


def mosaic_gpu_refusal(call: AttentionCall) -> str | None:
    dims = (call.q.shape[3], call.v.shape[3])
    return triton_refusal(call) or _first(
        {
            f"it runs on Hopper GPUs, and this program is for {target_chip()}": target_chip() not in HOPPER,
            "it has no segments": call.segment_ids is not None,
            "it has no position arrays": call.offsets is None,
            "it has no biases": call.relative_bias is not None or call.alibi_slopes is not None,
            "it needs bfloat16 or float16": call.q.dtype == jnp.float32,
            f"head_dim {dims[0]} (of v: {dims[1]}) is not one multiple of 64": dims[0] != dims[1] or dims[0] % 64 > 0,
        }
    )


def mosaic_gpu_reserve(call: AttentionCall) -> str | None:
    return "its matrix products have been compiled and interpreted, but no GPU has run them yet"


def triton_refusal(call: AttentionCall) -> str | None:
    return _first(
        {
            f"it runs on GPU, and this program is for {target_chip()}": target_chip() not in GPUS,
            **_kernel_limits(call, dtypes=("bfloat16", "float16", "float32")),
            f"its relative bias reaches {TRITON_MAX_DISTANCE} positions at most": (
                call.relative_bias is not None and call.relative_bias.max_distance > TRITON_MAX_DISTANCE
            ),
        }
    )


def cudnn_refusal(call: AttentionCall) -> str | None:
    mask, (_, _, q_length, kv_length) = call.mask, call.scores
    dims = (call.q.shape[3], call.v.shape[3])
    most = MAX_HEAD_DIM if target_chip() in HOPPER else 128
    given = sorted({array.dtype.name for array in (call.q, call.k, call.v)})
    hides = mask.causal or mask.window != (None, None)
    return _first(
        {
            f"it runs on GPU, and this program is for {target_chip()}": target_chip() not in GPUS,
            "it has no dropout here": call.dropout_rate > 0,
            "it has no soft-cap": call.soft_cap is not None,
            "it has no sinks": call.sinks is not None,
            "it gives the log-sum-exp in the dtype of the output": call.return_lse,
            "segments would take a mask as large as the scores": call.segment_ids is not None,
            "biases of positions would take an array as large as the scores": (
                call.relative_bias is not None or call.alibi_slopes is not None
            ),
            "it has neither chunks nor a prefix": mask.chunk is not None or mask.prefix is not None,
            "its window is for causal masks": mask.window != (None, None) and not mask.causal,
            "its masks need queries and keys at the same positions from the same number on": (
                hides and (q_length != kv_length or (offsets := call.known_offsets) is None or len(set(offsets)) > 1)
            ),
            f"it needs one dtype, bfloat16 or float16, and was given {', '.join(given)}": (
                given not in (["bfloat16"], ["float16"])
            ),
            f"head_dim {dims[0]} (of v: {dims[1]}) is not one multiple of 8 up to {most}": (
                dims[0] != dims[1] or dims[0] % 8 > 0 or dims[0] > most
            ),
            "its bias needs the dtype of q, all queries and keys, and even lengths": (
                call.bias is not None
                and (
                    call.bias.dtype != call.q.dtype
                    or call.bias.shape[2:] != (q_length, kv_length)
                    or q_length % 2 + kv_length % 2 > 0
                )
            ),
        }
    )


def _kernel_limits(call: AttentionCall, dtypes: tuple[str, ...]) -> dict[str, bool]:
    """What no Pallas kernel does: the reason, and whether it holds."""
    dims = (call.q.shape[3], call.v.shape[3])
    given = {call.q.dtype.name, call.k.dtype.name, call.v.dtype.name}
    return {
        "it has no dropout": call.dropout_rate > 0,
        "it has no general bias": call.bias is not None,
        f"it needs one dtype, {' or '.join(dtypes)}, and was given {', '.join(sorted(given))}": (
            len(given) > 1 or not given <= set(dtypes)
        ),
        f"head_dim {dims[0]} (of v: {dims[1]}) is not a multiple of 16 up to {MAX_HEAD_DIM}": (
            max(dims) > MAX_HEAD_DIM or dims[0] % 16 > 0 or dims[1] % 16 > 0
        ),
        "a relative bias needs consecutive positions: leave them out, or give two numbers": (
            call.relative_bias is not None and call.offsets is None
        ),
    }


def _first(reasons: dict[str, bool]) -> str | None:
    for reason, holds in reasons.items():
        if holds:
            return reason
    return None
