"""The analytical model against the compiler of this machine and against arithmetic."""

import dataclasses
from pathlib import Path

import jax
import pytest

from t5x_like.config import parse_config
from t5x_like.errors import UserError
from t5x_like.planning.analytical import analytical_plan
from t5x_like.planning.plan import Request
from t5x_like.planning.timing import EFFICIENCY
from t5x_like.planning.topology import parse_topology
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import compile_step, set_up
from tests import toy


def toy_request(request, topology, mesh, **run):
    """The toy with layers wide enough that memory is not all parameters."""
    experiment = toy.experiment(Path("unused"), mesh=mesh, **run)
    data = dataclasses.replace(experiment.data, sequence_length=128, batch_size=16)
    experiment = dataclasses.replace(experiment, data=data)
    return dataclasses.replace(request, experiment=experiment, topology=parse_topology(topology))


@pytest.mark.parametrize(
    ("devices", "bindings"),
    [
        (1, []),
        (1, ["BATCH_SIZE=48", "RunConfig.gradient_accumulation=4"]),
        (4, ["MeshConfig.data=1", "MeshConfig.fsdp=4"]),
        (4, ["MeshConfig.data=1", "MeshConfig.tensor=4"]),
        (8, ["MeshConfig.data=2", "MeshConfig.fsdp=2", "MeshConfig.tensor=2"]),
    ],
)
def test_memory_of_a_small_run_is_near_the_compilers_peak(devices, bindings):
    """The recipe for a CPU, whole: what XLA reserves for it on this machine."""
    given = ["MODEL_DIR='unused'", "TEXT_FILES='unused'", *bindings]
    experiment = parse_config(["runs/nanogpt_char.gin"], given, []).build(Experiment)
    modelled = analytical_plan(Request(experiment, parse_topology(f"cpu:{devices}"), 64)).memory
    job = set_up(experiment, build_mesh(experiment.mesh, jax.devices()[:devices]), 64)
    compiled = compile_step(job).memory_analysis()
    results = compiled.output_size_in_bytes - compiled.alias_size_in_bytes
    peak = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes + results
    assert sum(modelled.exact.values()) == compiled.argument_size_in_bytes
    assert modelled.total == pytest.approx(peak, rel=0.1 if jax.__version_info__ < (0, 11) else 0.15)


def test_parameters_and_flops_are_the_compilers(request_for_cpu, cpu_plan):
    plan = analytical_plan(request_for_cpu)
    assert plan.memory.exact == cpu_plan.memory.exact
    for field in ("mesh", "num_parameters", "tokens_per_step", "rows_per_device", "model_flops", "hardware_flops"):
        assert getattr(plan, field) == getattr(cpu_plan, field)


def test_gpus_are_planned_and_the_step_lowered_for_cuda(request_for_cpu):
    plan = analytical_plan(toy_request(request_for_cpu, "h100:8x2", MeshConfig(data=2, fsdp=4, tensor=2)))
    assert plan.source == "model"
    assert "CUDA" in plan.versions
    products = plan.hardware_flops / 16 / (plan.topology.chip.peak_flops * EFFICIENCY)
    assert products < plan.timing.compute < plan.seconds
    axes = {(c.kind, c.axes) for c in plan.timing.collectives}
    assert axes >= {
        ("all-gather", "fsdp"),
        ("reduce-scatter", "fsdp"),
        ("all-reduce", "data"),
        ("all-reduce", "tensor"),
    }


def test_bytes_of_collectives_are_those_of_the_parameters(request_for_cpu):
    """Each sharded parameter is gathered twice in bfloat16 and its gradient scattered once in float32."""
    plan = analytical_plan(toy_request(request_for_cpu, "v5p:2x2x1", MeshConfig(fsdp=4)))
    found = {c.kind: c for c in plan.timing.collectives if c.axes == "fsdp"}
    assert found["all-gather"].bytes == pytest.approx(2 * 2 * plan.num_parameters, rel=0.01)
    assert found["reduce-scatter"].bytes == pytest.approx(4 * plan.num_parameters, rel=0.01)


def test_too_much_memory_is_said(request_for_cpu):
    asked = toy_request(request_for_cpu, "v5e:2x2", MeshConfig(fsdp=4))
    data = dataclasses.replace(asked.experiment.data, sequence_length=2**17, batch_size=2**12)
    large = dataclasses.replace(asked, experiment=dataclasses.replace(asked.experiment, data=data))
    assert analytical_plan(large).out_of_memory > parse_topology("v5e:2x2").chip.memory


def test_axes_that_are_not_modelled_are_refused(request_for_cpu, monkeypatch):
    monkeypatch.setattr(MeshConfig, "resolve", lambda self, n: {**self.sizes, "data": 1, "stage": n})
    with pytest.raises(UserError, match=r"MeshConfig\.stage is 4: without a compiler only data, fsdp,"):
        analytical_plan(toy_request(request_for_cpu, "v5p:2x2x1", MeshConfig()))
