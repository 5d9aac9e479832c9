"""Options of the XLA compiler by name: what is known to help on each chip.

They are those of the public recipes for these chips (MaxText, tpu-recipes, gpu-recipes). A version of the compiler that
does not know one of them goes without it.
"""

import functools
from typing import Literal

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Options = dict[str, bool | int | str]
XlaProfile = Literal["v5", "v5p_moe", "v6e", "v6e_moe", "v7x", "v7x_moe", "multislice", "offload", "ring", "gpu"]

_OVERLAP: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
"""Collective operations beside computation."""

_SPARSE_CORE_REDUCTIONS: Options = {
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
    "xla_tpu_enable_all_reduce_offload_tracing": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_enable_instruction_fusion": False,
    "xla_sc_disable_megacore_partitioning": True,
}

_SPARSE_CORE_COLLECTIVES: Options = {
    **_SPARSE_CORE_REDUCTIONS,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
}

_OFFLOAD: Options = {
    "xla_tpu_enable_all_experimental_scheduler_features": True,
    "xla_tpu_enable_scheduler_memory_pressure_tracking": True,
    "xla_tpu_host_transfer_overlap_limit": 24,
    "xla_latency_hiding_scheduler_rerun": 2,
}

_GPU: Options = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_all_reduce_combine_threshold_bytes": 134_217_728,
    "xla_gpu_all_gather_combine_threshold_bytes": 134_217_728,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 67_108_864,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_enable_all_gather_combine_by_dim": False,
    "xla_gpu_enable_reduce_scatter_combine_by_dim": False,
}

PROFILES: dict[str, Options] = {
    # Weights that `fsdp` splits arrive whole: products with one share after the other, as they arrive, take twice the
    # cycles on these chips.
    "v5": {**_OVERLAP, "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    "v5p_moe": {
        **_SPARSE_CORE_COLLECTIVES,
        "xla_tpu_megacore_fusion_allow_ags": False,
        "xla_enable_async_collective_permute": True,
        "xla_tpu_scoped_vmem_limit_kib": 81_920,
    },
    "v6e": {**_OVERLAP, **_SPARSE_CORE_REDUCTIONS, "xla_tpu_scoped_vmem_limit_kib": 98_304},
    "v6e_moe": {**_OVERLAP, **_SPARSE_CORE_REDUCTIONS, "xla_tpu_scoped_vmem_limit_kib": 81_920},
    "v7x": {
        **_SPARSE_CORE_COLLECTIVES,
        "xla_tpu_bf16_emission_mode": "NATIVE_EMISSION",
        "xla_tpu_use_single_sparse_core_for_all_gather_offload": True,
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
        "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": True,
        "xla_tpu_enable_ici_ar_pipelining": True,
        "xla_tpu_scoped_vmem_limit_kib": 65_536,
    },
    "v7x_moe": {
        **_SPARSE_CORE_COLLECTIVES,
        "xla_tpu_bf16_emission_mode": "NATIVE_EMISSION",
        "xla_tpu_enable_sparse_core_collective_aggregator": True,
        "xla_tpu_enable_latency_hiding_layer_scheduler": True,
        "xla_tpu_scheduler_percent_shared_memory_limit": 150,
        "xla_tpu_enable_offloading_gather_to_sparsecore": True,
        "xla_tpu_scoped_vmem_limit_kib": 65_536,
    },
    "multislice": {
        **_OVERLAP,
        "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
    },
    "offload": _OFFLOAD,
    # Without them the scheduler of v5p and v6e puts the transfers of a ring before or after its kernels.
    "ring": {**_OVERLAP, "xla_tpu_enable_all_experimental_scheduler_features": True},
    "gpu": _GPU,
}
"""By chip: dense models, and mixtures of experts. `multislice` joins slices by data parallelism, `offload` is for
`StackConfig.remat = 'offload'`, `ring` for `ContextConfig.method = 'ring'`."""


def compiler_options(profile: str | None, device: jax.Device) -> Options:
    """The options of a profile that the compiler of this device knows; the others are named in a warning."""
    if profile is None:
        return {}
    meant_for = "gpu" if profile == "gpu" else "tpu"
    if device.platform != meant_for:
        logging.warning("MeshConfig.xla_profile %r is for %s: left out on %s.", profile, meant_for, device.platform)
        return {}
    known, refused = _known(profile, device)
    if refused:
        names = ", ".join(refused)
        logging.warning("This compiler knows nothing of %s, in MeshConfig.xla_profile %r: left out.", names, profile)
    return known


@functools.cache
def _known(profile: str, device: jax.Device) -> tuple[Options, list[str]]:
    """Options that compile a program, and the names of those that do not."""
    options = PROFILES[profile]
    if _compiles(options, device):
        return options, []
    known: Options = {}
    for name, value in options.items():  # Some are accepted only beside others, which come before them.
        if _compiles(known | {name: value}, device):
            known[name] = value
    return known, [name for name in options if name not in known]


def _compiles(options: Options, device: jax.Device) -> bool:
    mesh = Mesh(np.array([device]), ("alone",))
    with jax.set_mesh(mesh):  # instead of the mesh of the step
        number = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
        lowered = jax.jit(lambda x: x + 1).trace(number).lower(lowering_platforms=(device.platform,))
    try:
        lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True
