"""Compiles the GPU kernels to machine code with XLA's real compiler, without a GPU; prints a line of JSON per case.

python -m tests.kernels.compile_for_gpu triton a100 h100

Needs `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt`, of the version of jax; no driver and no other library.
"""

import contextlib
import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias
from t5x_like.kernels.grouped_matmul import grouped_matmul
from t5x_like.kernels.target import compiling_for
from tests.kernels.attention import lowering

CAUSAL = MaskSpec(causal=True)
CASES = {
    "T5 encoder, T=512, D=64, bias": {"lengths": (512, 512), "heads": (12, 12), "relative_bias": RelativeBias()},
    "Llama, T=4k, D=128, GQA, packed": {"lengths": (4096, 4096), "dims": (128, 128), "mask": CAUSAL, "segments": True},
    "T=16k, D=64": {"lengths": (16384, 16384), "mask": CAUSAL},
    "T=32k, D=256, window 1k": {
        "lengths": (32768, 32768),
        "dims": (256, 256),
        "mask": MaskSpec(causal=True, window=(1024, None)),
    },
    "Gemma, T=4k, D=256, soft-cap": {"lengths": (4096, 4096), "dims": (256, 256), "mask": CAUSAL, "soft_cap": 50.0},
    "T=2k, D=192/128": {"lengths": (2048, 2048), "dims": (192, 128), "mask": CAUSAL},
    "T=1000, D=80": {"lengths": (1000, 1000), "dims": (80, 80)},
    "T=128k, D=128": {"lengths": (131072, 131072), "heads": (1, 1), "dims": (128, 128), "mask": CAUSAL},
    "T=1000, D=128, float32": {"lengths": (1000, 1000), "dims": (128, 128), "dtype": jnp.float32},
}

GROUPED = {
    "16k rows, 2048 x 1536, 16 groups": (16384, 2048, 1536, 16, jnp.bfloat16),
    "1000 rows, 130 x 70, 5 groups": (1000, 130, 70, 5, jnp.bfloat16),
    "float32, 4096 rows, 1024 x 2048, 8 groups": (4096, 1024, 2048, 8, jnp.float32),
}

TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_core}
  core_count: {cores} fpus_per_core: {fpus} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: 84942979072 clock_rate_ghz: 1.4
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  device_vendor: "NVIDIA Corporation" name: "{name}" device_address_bits: 64
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
CHIPS = {
    "a100": {
        "shared": 166912,
        "shared_core": 167936,
        "cores": 108,
        "fpus": 64,
        "bandwidth": 2039000000000,
        "cache": 41943040,
        "major": 8,
        "minor": 0,
        "features": "",
        "name": "NVIDIA A100-SXM4-80GB",
    },
    "h100": {
        "shared": 232448,
        "shared_core": 233472,
        "cores": 132,
        "fpus": 128,
        "bandwidth": 3352320000000,
        "cache": 52428800,
        "major": 9,
        "minor": 0,
        "features": "feature_extension: ACCELERATED_FEATURES",
        "name": "NVIDIA H100 80GB HBM3",
    },
    "gpu": {
        "shared": 101376,
        "shared_core": 102400,
        "cores": 58,
        "fpus": 128,
        "bandwidth": 300000000000,
        "cache": 50331648,
        "major": 8,
        "minor": 9,
        "features": "",
        "name": "NVIDIA L4",
    },
}
"""What XLA asks about a GPU, from NVIDIA's data sheets and its CUDA programming guide."""


def grouped_gradient(m, k, n, num_groups, dtype):
    """The gradient of a grouped product, and shapes for it."""
    shapes = ((m, k), dtype), ((num_groups, k, n), dtype), ((num_groups,), jnp.int32)
    loss = lambda *arrays: jnp.sum(grouped_matmul(*arrays, backend="triton").astype(jnp.float32) ** 2)
    return jax.grad(loss, (0, 1)), tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def compile_gradient(chip, function, arguments):
    """Seconds to compile one gradient, and bytes of its arguments and temporaries."""
    # The cpu platform must be there before the plugin is asked for a topology.
    jax.devices()
    target = TARGET.format(**CHIPS[chip])
    device = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=target).devices[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments)
    start = time.time()
    with compiling_for(chip):
        traced = jax.jit(function).trace(*arguments)
        memory = traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    return {
        "seconds": round(time.time() - start, 1),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def main(backend, chips):
    for chip in chips:
        calls = {("attention", name): lowering.gradient(backend, **case) for name, case in CASES.items()}
        if backend == "triton":
            calls |= {("grouped matmul", name): grouped_gradient(*case) for name, case in GROUPED.items()}
        for (kernel, name), call in calls.items():
            with contextlib.suppress(UserError):  # what a backend refuses is no case of it
                result = {"kernel": kernel, "chip": chip, "case": name, **compile_gradient(chip, *call)}
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(CHIPS))
