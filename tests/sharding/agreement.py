"""Attention on a mesh against the same call on one device: outputs, log-sum-exp and all gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.kernels.attention import MaskSpec
from t5x_like.kernels.attention.attention import attend
from t5x_like.kernels.attention.call import call_of
from t5x_like.kernels.attention.logits import MASK_VALUE
from t5x_like.sharding import attention as sharded
from t5x_like.sharding import context
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import ContextConfig, Placement
from t5x_like.sharding.token_runs import from_zigzag, to_zigzag

HEADS, HEAD_DIM = 4, 8


def arrays(length: int, *, batch: int = 2, heads: int = HEADS, kv_heads: int = 2, kv_length: int | None = None):
    rng = np.random.default_rng(length)
    shapes = {"q": (length, heads), "k": (kv_length or length, kv_heads), "v": (kv_length or length, kv_heads)}
    return {name: rng.normal(size=(batch, *shape, HEAD_DIM)).astype(np.float32) for name, shape in shapes.items()}


def packed(length: int, batch: int = 2) -> np.ndarray:
    """Segment ids in rising order with padding at the end."""
    ids = np.sort(np.random.default_rng(1).integers(1, 4, (batch, length)), axis=1).astype(np.int32)
    ids[:, -length // 8 :] = 0
    return ids


def results(attention, trained: dict[str, np.ndarray], options: dict[str, Any], zigzag: int | None = None):
    """Compiles the call and its gradients; `zigzag`: devices in whose order the tokens are to lie inside."""

    def loss(trained):
        given = {**options, **trained}
        if "table" in given:
            given["relative_bias"] = (given["relative_bias"], given.pop("table"))
        if zigzag:
            given |= {name: to_zigzag(given[name], zigzag) for name in "qkv"}
            if "segment_ids" in given:
                given["segment_ids"] = tuple(to_zigzag(jnp.asarray(ids), zigzag) for ids in given["segment_ids"])
        o, lse = attention(call_of(**given, return_lse=True))
        if zigzag:
            o, lse = from_zigzag(o, zigzag), from_zigzag(lse, zigzag)
        weights = np.random.default_rng(2).normal(size=o.shape).astype(np.float32)
        total = jnp.sum(o * weights) + jnp.sum(jnp.where(lse > MASK_VALUE / 2, jnp.sin(lse), 0))
        return total, {"o": o, "lse": lse}

    return jax.jit(jax.grad(loss, has_aux=True)).lower(trained).compile()


def check(sizes: dict[str, int], trained: dict[str, np.ndarray], options: dict[str, Any], **config) -> str:
    """Compares, and returns the compiled program on the mesh."""
    config = ContextConfig(**config)
    mesh = build_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    causal = options.get("mask", MaskSpec()).causal
    balanced = causal and config.balance and config.method != "ulysses" and sizes.get("sequence", 1) > 1
    zigzag = sizes["sequence"] if balanced else None
    with Placement(mesh, config).use(), context._in_zigzag(balanced):
        program = results(sharded.attend, trained, options, zigzag)
        ours = jax.device_get(program(trained))
    expected = jax.device_get(results(attend, trained, options)(trained))
    for one, other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one[1], other, atol=1e-5 * max(1, np.abs(other).max()), err_msg=str(one[0]))
    return program.as_text()
