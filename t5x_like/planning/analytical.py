"""The analytical model: a plan from the traced program and the mesh alone, in a second, without any compiler.

Parameters, optimizer state, batch and model FLOPs are exact. The rest is a model: memory by playing the program (see
`liveness`), matrix products at a fixed share of the peak, collectives as sharding implies them.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from t5x_like.errors import UserError
from t5x_like.kernels.target import compiling_for
from t5x_like.planning.collectives import Network
from t5x_like.planning.flops import count_flops
from t5x_like.planning.liveness import batch_shares, peak_bytes, sharded_size
from t5x_like.planning.memory import Memory, exact_parts
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.timing import EFFICIENCY, Collective, Segment, Timing
from t5x_like.planning.topology import Topology
from t5x_like.sharding.mesh import MESH_AXES, MeshConfig
from t5x_like.sharding.placement import is_axes
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import Job, set_up

HIDDEN = 0.7
"""Share of the computation that can hide the gathers and reductions of data parallelism."""
RESERVED = {"cpu": 1.12}
"""What a compiler reserves as a multiple of the bytes alive at one time (measured: 1.10 to 1.13). Those of accelerators
fuse more than `liveness.FUSED`, which makes up for it."""
MODELLED = ("data", "fsdp", "expert", "sequence", "tensor")


def analytical_plan(request: Request, lower: bool = True, traces: dict | None = None) -> Plan:
    """A plan without a compiler.

    Args:
      request: what to plan.
      lower: for GPUs, also checks that every operation of the step can be lowered for CUDA.
      traces: kept from call to call, saves tracing runs that differ only in how `data` and `fsdp` share the batch.

    Raises:
      UserError: if the run does not fit together, or the mesh has axes that are not modelled.
    """
    experiment, topology, chip = request.experiment, request.topology, request.topology.chip
    sizes = experiment.mesh.resolve(topology.num_devices)
    beyond = [axis for axis, size in sizes.items() if size > 1 and axis not in MODELLED]
    if beyond:
        raise UserError(
            f"MeshConfig.{beyond[0]} is {sizes[beyond[0]]}: without a compiler only {', '.join(MODELLED)} are "
            "modelled. For a TPU topology, install the extra `plan`."
        )
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    with compiling_for(topology.chip_name if chip.dims else chip.platform, topology.num_devices):
        job = set_up(experiment, mesh, request.vocab_size)
        kept, key = (
            {} if traces is None else traces,
            repr((_without_mesh(experiment), [sizes[axis] for axis in IN_THE_PROGRAM])),
        )
        with job.placement.use():
            traced = kept.get(key) or jax.jit(job.train_step).trace(job.state, job.batch)
            kept[key] = traced
            if lower and chip.platform == "gpu":
                traced.lower(lowering_platforms=("cuda",))
    jaxpr = traced.jaxpr
    memory = predicted_memory(job, jaxpr, sizes, experiment, RESERVED.get(chip.platform, 1.0))
    flops = count_flops(jaxpr)
    return Plan(
        source="model",
        topology=topology,
        mesh=sizes,
        num_parameters=job.num_parameters,
        num_active_parameters=job.num_active_parameters,
        tokens_per_step=job.tokens_per_step,
        rows_per_device=experiment.data.batch_size / batch_shares(sizes),
        memory=memory,
        out_of_memory=memory.total if chip.memory and memory.total > chip.memory else None,
        model_flops=job.flops_per_token * job.tokens_per_step,
        hardware_flops=flops,
        timing=_timing(job, request, sizes, flops) if chip.peak_flops else None,
        versions=f"lowered for CUDA by jax {jax.__version__}" if lower and chip.platform == "gpu" else "",
    )


IN_THE_PROGRAM = ("expert", "sequence", "tensor")
"""Axes that the traced program itself depends on; the others only say where the arrays are."""


def _without_mesh(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, mesh=MeshConfig())


def predicted_memory(job: Job, jaxpr: Any, sizes: dict[str, int], experiment: Experiment, reserved: float) -> Memory:
    """Memory by playing the program; what it needs beside its arguments is one number here."""
    data, parameters = experiment.data, jax.tree.leaves(job.state.params)
    rows = {data.batch_size, data.batch_size // experiment.run.gradient_accumulation}
    state = {a.shape: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in parameters}
    size = sharded_size(sizes, rows, set(job.row_lengths.values()), _tensor_dims(job), state)
    exact = exact_parts(job)
    working = int(reserved * peak_bytes(jaxpr, size, donated=len(jax.tree.leaves(job.state))))
    return Memory(exact, None, {"temporaries": working}, sum(exact.values()) + working)


def _tensor_dims(job: Job) -> set[int]:
    """Sizes of the dims that the tensor axis splits."""
    names = {name for name, axes in job.placement.rules if "tensor" in axes}
    dims = set()
    for array, axes in zip(jax.tree.leaves(job.state.params), _axes(job), strict=True):
        local = array.sharding.shard_shape(array.shape)
        split = zip(array.shape, local, axes, strict=True)
        dims |= {whole for whole, part, name in split if name in names and part < whole}
    return dims


def _axes(job: Job) -> list[tuple[str, ...]]:
    return jax.tree.leaves(job.spec.axes, is_leaf=is_axes)


def _timing(job: Job, request: Request, sizes: dict[str, int], flops: float) -> Timing:
    chip, parts = request.topology.chip, request.experiment.run.gradient_accumulation
    state = sum(exact_parts(job).values())
    products = flops / request.topology.num_devices / (chip.peak_flops * EFFICIENCY)
    # The optimizer reads and writes all state; elementwise work of the layers is within the efficiency above.
    update = 2 * state / chip.memory_bandwidth
    compute = products + update
    collectives = _collectives(job, request, sizes, parts)
    hideable = HIDDEN * compute
    for collective in collectives:
        hidden = 0.0 if collective.axes == "tensor" else min(collective.seconds, hideable)
        hideable -= hidden
        collective.exposed = collective.seconds - hidden
        collective.overlapped = collective.count * hidden / collective.seconds if collective.seconds else 0
    exposed = sum(c.exposed for c in collectives)
    scopes = {f"matrix products at {EFFICIENCY:.0%} of the peak": products, "optimizer, by memory bandwidth": update}
    timeline = [
        Segment(name, "compute", start, s)
        for name, start, s in zip(scopes, (0.0, products), scopes.values(), strict=True)
    ]
    timeline += [Segment("collectives that nothing hides", "collective", compute, exposed)] if exposed else []
    return Timing(compute + exposed, compute, 0.0, collectives, scopes, timeline)


def _collectives(job: Job, request: Request, sizes: dict[str, int], parts: int) -> list[Collective]:
    """What each axis implies, the longest first."""
    network = abstract_network(request.topology, sizes)
    data = request.experiment.data
    tokens = data.batch_size * data.sequence_length / parts / (batch_shares(sizes) * sizes["sequence"])
    activation = tokens * job.model.d_model * 2
    found: dict[tuple[str, str], Collective] = {}

    def add(kind: str, axis: str, count: float, size: float) -> None:
        if sizes[axis] == 1 or not count:
            return
        total = found.setdefault((kind, axis), Collective(kind, axis))
        total.count += count
        total.bytes += count * size
        total.seconds += count * network.seconds(kind, int(size), network.group(axis))

    for array, axes in zip(jax.tree.leaves(job.state.params), _axes(job), strict=True):
        spec = {name for entry in array.sharding.spec for name in (entry if isinstance(entry, tuple) else (entry,))}
        layers = array.shape[0] if axes and axes[0] == "layers" else 1
        size = array.size / layers / math.prod(sizes[axis] for axis in ("tensor", "expert") if axis in spec)
        if "fsdp" in spec:
            add("all-gather", "fsdp", 2 * layers * parts, size * 2)  # in bfloat16, forward and backward
            add("reduce-scatter", "fsdp", layers * parts, size * 4)
        else:
            add("all-reduce", "fsdp", layers, size * 4)
        for axis in {"data", "expert", "sequence"} - spec:
            add("all-reduce", axis, layers, size * 4 / (sizes["fsdp"] if "fsdp" in spec else 1))
        if "tensor" in spec and axes[-1] == "embed" and len(axes) > 2:
            add("all-reduce", "tensor", 2 * layers * parts, activation)  # of the block, forward and backward
    for block in (block for stack in job.model.stacks.values() for block in stack.blocks):
        exchanged = 0 if block.mixer is None else block.mixer.exchanged(job.model.d_model) / sizes["tensor"]
        gathered = tokens * sizes["sequence"] * exchanged * 2
        add("all-gather", "sequence", 2 * parts, gathered)
        add("reduce-scatter", "sequence", parts, gathered)
        if block.num_experts is not None:  # every device sees its group's tokens, forward and backward
            add("all-gather", "expert", 2 * parts, activation * sizes["expert"])
            add("reduce-scatter", "expert", 2 * parts, activation * sizes["expert"])
    return sorted(found.values(), key=lambda c: -c.seconds)


def abstract_network(topology: Topology, sizes: dict[str, int]) -> "_AbstractNetwork":
    """Devices in the order of the torus's coordinates, or of the nodes."""
    chip = topology.chip
    if chip.dims:
        places = np.array(list(np.ndindex(topology.num_slices, *topology.shape)))
        places = np.repeat(np.roll(places, -1, axis=1), chip.devices, axis=0)
    else:
        places = (np.arange(topology.num_devices) // topology.devices_per_group)[:, None]
    return _AbstractNetwork(topology, tuple(sizes), tuple(sizes.values()), places)


class _AbstractNetwork(Network):
    def group(self, axis: str) -> np.ndarray:
        """The first devices along an axis."""
        numbers = np.arange(math.prod(self.sizes)).reshape(self.sizes)
        return numbers[tuple(slice(None) if name == axis else 0 for name in self.axes)]
