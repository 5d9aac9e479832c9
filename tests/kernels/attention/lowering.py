"""Calls of attention to be lowered for a machine that is not there."""

import jax
import jax.export
import jax.numpy as jnp

from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.target import compiling_for

CASES = {
    "causal": {"mask": MaskSpec(causal=True)},
    "packed": {"segments": True, "mask": MaskSpec(causal=True, window=(100, None))},
    "positions": {"arrays": True, "mask": MaskSpec(causal=True, chunk=256)},
    "relative bias": {"relative_bias": RelativeBias(), "soft_cap": 30.0},
    "relative bias and offsets": {"relative_bias": RelativeBias(), "offsets": True, "sinks": True},
    "alibi, 192/128": {"alibi": True, "mask": MaskSpec(causal=True, prefix=30), "dims": (192, 128)},
    "ragged, 256": {"lengths": (1000, 700), "dims": (256, 256)},
    "float32": {"dtype": jnp.float32},
}


def gradient(
    backend,
    mask=MaskSpec(),
    lengths=(1024, 1024),
    heads=(4, 2),
    dims=(64, 64),
    dtype=jnp.bfloat16,
    relative_bias=None,
    soft_cap=None,
    segments=False,
    arrays=False,
    offsets=False,
    alibi=False,
    sinks=False,
):
    """The gradient of a call, and shapes for it."""
    shape = jax.ShapeDtypeStruct
    q_shape, kv_shapes = (2, lengths[0], heads[0], dims[0]), [(2, lengths[1], heads[1], dim) for dim in dims]
    trained = {"q": shape(q_shape, dtype), "k": shape(kv_shapes[0], dtype), "v": shape(kv_shapes[1], dtype)}
    per_token = tuple(shape((2, length), jnp.int32) for length in lengths)
    fixed = {}
    if relative_bias:
        trained["table"] = shape((heads[0], relative_bias.num_buckets), jnp.float32)
    if sinks:
        trained["sinks"] = shape(heads[:1], jnp.float32)
    if alibi:
        fixed["alibi_slopes"] = shape(heads[:1], jnp.float32)
    if segments:
        fixed["segment_ids"] = per_token
    if arrays:
        fixed["positions"] = per_token
    if offsets:
        fixed["positions"] = (shape((), jnp.int32),) * 2

    def loss(trained, fixed):
        trained = dict(trained)
        bias = {"relative_bias": (relative_bias, trained.pop("table"))} if relative_bias else {}
        return attention(**trained, **fixed, **bias, mask=mask, soft_cap=soft_cap, backend=backend).sum()

    return jax.grad(loss), (trained, fixed)


def for_cuda(function, arguments, chip):
    """The program for a GPU, as text."""
    kind = {"a100": "NVIDIA A100-SXM4-80GB", "gpu": "NVIDIA L4"}.get(chip, "NVIDIA H100 80GB HBM3")
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("_",), abstract_device=device)
    unchecked = ("__gpu$xla.gpu.triton", "mosaic_gpu_v2", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in unchecked]
    with compiling_for(chip), jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)
    return exported.mlir_module()
