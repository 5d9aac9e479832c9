"""Compiles the TPU kernels with the real compiler, without a TPU; prints a line of JSON per case. Needs libtpu.

python tests/kernels/attention/compile_for_tpu.py v4 v5e v5p v6e v7x
"""

import json
import os
import sys
import time

# libtpu must not look for the machine it would run on.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.attention.target import compiling_for

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

CAUSAL = MaskSpec(causal=True)
CASES = {
    "T5 encoder, T=512, D=64, bias": {"length": 512, "heads": 12, "dim": 64, "relative_bias": True, "mask": MaskSpec()},
    "Llama, T=4k, D=128, GQA 4, packed": {"length": 4096, "heads": 8, "kv_heads": 2, "packed": True},
    "T=8k, D=128, bias, packed": {"length": 8192, "heads": 2, "relative_bias": True, "packed": True},
    "T=32k, D=128": {"length": 32768, "heads": 2},
    "T=32k, D=256, window 1k": {"length": 32768, "dim": 256, "mask": MaskSpec(causal=True, window=(1024, None))},
    "Gemma, T=4k, D=256, soft-cap": {"length": 4096, "heads": 2, "dim": 256, "soft_cap": 50.0},
    "T=2k, D=192/128, chunk 1k": {"length": 2048, "dim": 192, "v_dim": 128, "mask": MaskSpec(causal=True, chunk=1024)},
    "T=1000, D=80, float32": {"length": 1000, "dim": 80, "dtype": jnp.float32, "packed": True},
    "T=128k, D=128": {"length": 131072},
}


def compile_gradient(
    chip,
    length,
    heads=1,
    kv_heads=None,
    dim=128,
    v_dim=None,
    mask=CAUSAL,
    relative_bias=False,
    packed=False,
    soft_cap=None,
    dtype=jnp.bfloat16,
):
    """Seconds to compile one gradient, and bytes of its arguments and temporaries."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    shape = lambda *sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))
    kv_heads = kv_heads or heads
    q, k, v = (
        shape(1, length, *size, dtype=dtype) for size in ((heads, dim), (kv_heads, dim), (kv_heads, v_dim or dim))
    )
    table = shape(heads, 32, dtype=jnp.float32) if relative_bias else None
    segments = shape(1, length, dtype=jnp.int32) if packed else None

    def loss(q, k, v, table, segments):
        bias = None if table is None else (RelativeBias(), table)
        pair = None if segments is None else (segments, segments)
        o = attention(q, k, v, mask=mask, segment_ids=pair, relative_bias=bias, soft_cap=soft_cap, backend="tpu")
        return jnp.sum(o.astype(jnp.float32) ** 2)

    start = time.time()
    with compiling_for(chip):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if relative_bias else (0, 1, 2)))
        traced = gradient.trace(q, k, v, table, segments)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    return {
        "seconds": round(time.time() - start, 1),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def main(chips):
    for chip in chips:
        for name, case in CASES.items():
            print(json.dumps({"chip": chip, "case": name, **compile_gradient(chip, **case)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or TOPOLOGIES)
