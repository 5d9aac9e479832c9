"""Compiles a step for devices that are not there: `python -m t5x_like.planning.worker REQUEST ANSWER DUMP`.

A process of its own, because libtpu takes its settings from the environment when it is loaded, and must not meddle with
the devices of the process that asks.
"""

import importlib.metadata
import os
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from t5x_like.errors import UserError
from t5x_like.kernels.target import compiling_for
from t5x_like.planning.collectives import Network
from t5x_like.planning.flops import count_flops
from t5x_like.planning.hlo import Module, parse_module
from t5x_like.planning.liveness import batch_shares
from t5x_like.planning.memory import from_compiler
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.timing import EFFICIENCY, Timing, predict
from t5x_like.planning.topology import Topology
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.job import Job, compile_step, set_up

OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMGT]?)\) exceeds available", re.DOTALL)


def main(arguments: list[str]) -> None:
    request_file, answer_file, dump = map(Path, arguments)
    try:
        answer = plan(pickle.loads(request_file.read_bytes()), dump)
    except UserError as error:
        answer = error
    answer_file.write_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # without waiting for a compiler that was not needed to the end


def plan(request: Request, dump: Path) -> Plan:
    """Compiles what `train` would run and reads the compiler's own account of it in `dump`."""
    experiment, topology = request.experiment, request.topology
    devices = devices_of(topology)
    mesh = build_mesh(experiment.mesh, devices)
    with compiling_for(topology.chip_name, topology.num_devices):
        job = set_up(experiment, mesh, request.vocab_size)
        with job.placement.use():
            hardware_flops = count_flops(jax.make_jaxpr(job.train_step)(job.state, job.batch))
        start = time.perf_counter()
        compiled, needed = _compile(job, dump if request.quick else None)
    seconds = time.perf_counter() - start
    module = parse_module(_dumped(dump, "after_codegen" if topology.chip.dims and compiled else "after_optimizations"))
    assignment = _dumped(dump, "after_optimizations-buffer-assignment")
    memory = from_compiler(job, module, assignment, compiled.memory_analysis() if compiled is not None else None)
    return Plan(
        source="quick" if request.quick else "compiler",
        topology=topology,
        mesh=dict(mesh.shape),
        num_parameters=job.num_parameters,
        num_active_parameters=job.num_active_parameters,
        tokens_per_step=job.tokens_per_step,
        rows_per_device=experiment.data.batch_size / batch_shares(mesh.shape),
        memory=memory,
        out_of_memory=needed,
        model_flops=job.flops_per_token * job.tokens_per_step,
        hardware_flops=hardware_flops,
        timing=None if needed else _timing(module, topology, mesh, hardware_flops if request.quick else None),
        cycles=module.cycles() if topology.chip.dims and compiled is not None else None,
        compile_seconds=seconds,
        versions=_versions(topology),
    )


def devices_of(topology: Topology) -> list[jax.Device]:
    """Devices to compile for: of a TPU that is not there, or this process's virtual CPU devices."""
    if topology.chip.platform != "tpu":
        return jax.devices()
    from jax.experimental import topologies

    name = topology.name.lower().replace("v7x", "tpu7x").replace("tputpu", "tpu")
    wrap = (*topology.wrap, False)[:3]  # three, also for a torus of two dims
    options = {"wrap": wrap} if any(wrap) else {}
    if topology.chip_name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as on a Cloud TPU
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def network_of(topology: Topology, mesh: jax.sharding.Mesh) -> Network:
    """Where the mesh's devices are on the torus and in which slice."""
    coords = [(*device.coords, getattr(device, "slice_index", 0)) for device in mesh.devices.flat]
    dims = topology.chip.dims
    return Network(topology, mesh.axis_names, mesh.axis_sizes, np.array([(*c[:dims], c[-1]) for c in coords]))


def _timing(module: Module, topology: Topology, mesh: jax.sharding.Mesh, flops: float | None) -> Timing | None:
    if topology.chip.clock is None:
        return None
    timing = predict(module, network_of(topology, mesh))
    if flops is None:
        return timing
    compute = flops / topology.num_devices / (topology.chip.peak_flops * EFFICIENCY)
    exposed = sum(c.exposed for c in timing.collectives)
    return Timing(compute + exposed, compute, collectives=timing.collectives, assumed_loops=timing.assumed_loops)


def _compile(job: Job, dump: Path | None) -> tuple[jax.stages.Compiled | None, int | None]:
    """The program and nothing; nothing and the bytes needed if it runs out of memory; or nothing twice.

    With `dump`, the last: as soon as the compiler has written there which memory it reserves, while it goes on.
    """
    try:
        if dump is None:
            return compile_step(job), None  # in this thread: beside another one libtpu has been seen to hang
        future = ThreadPoolExecutor(1).submit(compile_step, job)
        while not future.done():
            if list(dump.glob("*train_step*after_buffer_assignment.txt")):
                time.sleep(0.5)  # until the file is whole
                return None, None
            time.sleep(0.1)
        return future.result(), None
    except jax.errors.JaxRuntimeError as error:
        return None, _bytes_needed(error)


def _bytes_needed(error: Exception) -> int:
    """From the compiler's message; any other error is raised again."""
    found = OUT_OF_MEMORY.search(str(error))
    if found is None:
        raise error
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def _dumped(dump: Path, kind: str) -> str:
    """The newest file of this kind that the compiler wrote about the step."""
    files = sorted(dump.glob(f"*train_step*{kind}.txt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(
            f"The compiler wrote no {kind} for the step: this version of JAX or libtpu is not known to plan."
        )
    return files[-1].read_text()


def _versions(topology: Topology) -> str:
    names = ["jax", "libtpu"] if topology.chip.platform == "tpu" else ["jax", "jaxlib"]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


if __name__ == "__main__":
    main(sys.argv[1:])
