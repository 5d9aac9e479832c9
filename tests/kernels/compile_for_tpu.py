"""Compiles the TPU kernels with the real compiler, without a TPU; prints a line of JSON per case. Needs libtpu.

python tests/kernels/compile_for_tpu.py v4 v5e v5p v6e v7x
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

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
from t5x_like.kernels.grouped_matmul import grouped_matmul
from t5x_like.kernels.target import compiling_for

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

CAUSAL = MaskSpec(causal=True)
Shapes = dict[str, tuple[tuple[int, ...], jnp.dtype] | None]


@dataclass(frozen=True)
class Attention:
    length: int
    heads: int = 1
    kv_heads: int | None = None
    dim: int = 128
    v_dim: int | None = None
    mask: MaskSpec = CAUSAL
    relative_bias: bool = False
    packed: bool = False
    soft_cap: float | None = None
    dtype: jnp.dtype = jnp.bfloat16

    kernel = "attention"
    factor = 4
    """Temporaries may be so many times the arguments: output, its gradient, log-sum-exp, sums of parts in float32."""

    def shapes(self) -> tuple[Shapes, Shapes]:
        """Of what is trained, and of the rest."""
        kv_heads = self.kv_heads or self.heads
        sizes = {"q": (self.heads, self.dim), "k": (kv_heads, self.dim), "v": (kv_heads, self.v_dim or self.dim)}
        trained = {name: ((1, self.length, *size), self.dtype) for name, size in sizes.items()}
        if self.relative_bias:
            trained["table"] = ((self.heads, 32), jnp.float32)
        return trained, {"segments": ((1, self.length), jnp.int32)} if self.packed else {}

    def run(self, trained, fixed):
        bias = (RelativeBias(), trained["table"]) if self.relative_bias else None
        pair = (fixed["segments"],) * 2 if self.packed else None
        options = {"mask": self.mask, "segment_ids": pair, "relative_bias": bias, "soft_cap": self.soft_cap}
        return attention(trained["q"], trained["k"], trained["v"], **options, backend="tpu")


@dataclass(frozen=True)
class GroupedMatmul:
    m: int
    k: int
    n: int
    groups: int
    dtype: jnp.dtype = jnp.bfloat16

    kernel = "grouped matmul"
    factor = 3
    """The product, its gradient, and copies with ragged dims padded, which are large where the dims are small."""

    def shapes(self) -> tuple[Shapes, Shapes]:
        trained = {"lhs": ((self.m, self.k), self.dtype), "rhs": ((self.groups, self.k, self.n), self.dtype)}
        return trained, {"sizes": ((self.groups,), jnp.int32)}

    def run(self, trained, fixed):
        return grouped_matmul(trained["lhs"], trained["rhs"], fixed["sizes"], backend="tpu")


CASES: dict[str, Attention | GroupedMatmul] = {
    "T5 encoder, T=512, D=64, bias": Attention(512, heads=12, dim=64, relative_bias=True, mask=MaskSpec()),
    "Llama, T=4k, D=128, GQA 4, packed": Attention(4096, heads=8, kv_heads=2, packed=True),
    "T=8k, D=128, bias, packed": Attention(8192, heads=2, relative_bias=True, packed=True),
    "T=32k, D=128": Attention(32768, heads=2),
    "T=32k, D=128, bias": Attention(32768, relative_bias=True),
    "T=32k, D=256": Attention(32768, dim=256),
    "T=32k, D=256, window 1k": Attention(32768, dim=256, mask=MaskSpec(causal=True, window=(1024, None))),
    "Gemma, T=4k, D=256, soft-cap": Attention(4096, heads=2, dim=256, soft_cap=50.0),
    "T=2k, D=192/128, chunk 1k": Attention(2048, dim=192, v_dim=128, mask=MaskSpec(causal=True, chunk=1024)),
    "T=1000, D=80, float32": Attention(1000, dim=80, dtype=jnp.float32, packed=True),
    "T=128k, D=128": Attention(131072),
    "Mixtral, 32k rows, 4096 x 14336, 8 groups": GroupedMatmul(32768, 4096, 14336, 8),
    "DeepSeek, 64k rows, 7168 x 2048, 32 groups": GroupedMatmul(65536, 7168, 2048, 32),
    "Qwen, 16k rows, 2048 x 1536, 128 groups": GroupedMatmul(16384, 2048, 1536, 128),
    "ragged, 4000 rows, 2000 x 700, 16 groups": GroupedMatmul(4000, 2000, 700, 16),
    "float32, 4096 rows, 1024 x 2048, 8 groups": GroupedMatmul(4096, 1024, 2048, 8, jnp.float32),
}


def compile_gradient(chip: str, case: Attention | GroupedMatmul) -> dict[str, float]:
    """Seconds to compile one gradient; bytes of its arguments, of its temporaries, and the most that these may be."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    shape: Callable = lambda sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))
    trained, fixed = ({name: shape(*array) for name, array in arrays.items()} for arrays in case.shapes())
    loss = lambda trained, fixed: jnp.sum(case.run(trained, fixed).astype(jnp.float32) ** 2)
    start = time.time()
    with compiling_for(chip):
        traced = jax.jit(jax.grad(loss)).trace(trained, fixed)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    return {
        "seconds": round(time.time() - start, 1),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "bound": case.factor * memory.argument_size_in_bytes + 2**24,
    }


def main(chips: list[str]):
    for chip in chips:
        for name, case in CASES.items():
            result = {"kernel": case.kernel, "chip": chip, "case": name, **compile_gradient(chip, case)}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TOPOLOGIES))
