"""Plans by the real compiler of a TPU, without a TPU."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_like.commands.dry_run import known_vocabulary
from t5x_like.config import parse_config
from t5x_like.planning.compile import LIBTPU_ENVIRONMENT, compile_plan, has_compiler
from t5x_like.planning.plan import Request
from t5x_like.planning.topology import parse_topology
from t5x_like.sharding.mesh import MeshConfig
from t5x_like.training.experiment import Experiment
from tests import toy

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(not has_compiler("tpu"), reason="libtpu is not installed (extra: plan)"),
]


@pytest.fixture(scope="module")
def plan(request_for_cpu):
    stack = dataclasses.replace(toy.model().stack, remat="full")
    experiment = toy.experiment(
        Path(request_for_cpu.experiment.run.model_dir),
        mesh=MeshConfig(fsdp=4),
        decoder=toy.model(stack=stack, d_model=512),
    )
    topology = parse_topology("v5e:2x2")
    return compile_plan(dataclasses.replace(request_for_cpu, experiment=experiment, topology=topology))


def test_what_the_step_is_given_is_what_the_compiler_says(plan):
    """A TPU gives every array at least 512 bytes and stores it in tiles; nothing here is smaller than a tile but
    the two counters of steps and the norms."""
    padding = plan.memory.arguments - sum(plan.memory.exact.values())
    assert 0 <= padding <= 64 * 4096


def test_the_step_is_predicted(plan):
    assert plan.out_of_memory is None
    assert 1e-6 < plan.timing.compute < plan.seconds < 1
    assert {c.axes for c in plan.timing.collectives} <= {"fsdp", "-"}
    assert any("Linear" in scope for scope in plan.timing.scopes)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_experts_run_their_kernels_within_stages(schedule):
    bindings = [
        "MeshConfig.data = 1",
        "MeshConfig.fsdp = 2",
        "MeshConfig.stage = 2",
        "MeshConfig.expert = 2",
        "StackConfig.scan_layers = True",
        "StackConfig.pipeline = @PipelineConfig()",
        "PipelineConfig.num_microbatches = 4",
        f"PipelineConfig.schedule = '{schedule}'",
    ]
    experiment = parse_config(["runs/moe_tiny.gin"], bindings).build(Experiment)
    plan = compile_plan(Request(experiment, parse_topology("v5p:2x2x2"), known_vocabulary(experiment)))
    assert plan.timing.kernels > 0
    assert any("grouped_matmul" in scope for scope in plan.timing.scopes)
    assert ("collective-permute", "stage") in {(c.kind, c.axes) for c in plan.timing.collectives}


@pytest.mark.parametrize("name", ["v6e:16x16", "v5e:16x16", "v5p:4x4x8", "v4:4x4x4", "v7x:4x4x4"])
def test_a_torus_has_its_devices(name):
    topology = parse_topology(name)
    question = f"from t5x_like.planning.worker import *; print(len(devices_of(parse_topology({name!r}))))"
    question = "from t5x_like.planning.topology import parse_topology; " + question
    environment = os.environ | LIBTPU_ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", question], env=environment, capture_output=True, text=True)
    assert found.stdout.split()[-1] == str(topology.num_devices), found.stderr


def test_out_of_memory_is_an_answer(request_for_cpu, plan):
    data = dataclasses.replace(request_for_cpu.experiment.data, sequence_length=65536, batch_size=4096)
    experiment = dataclasses.replace(request_for_cpu.experiment, data=data, mesh=MeshConfig(fsdp=4))
    large = compile_plan(dataclasses.replace(request_for_cpu, experiment=experiment, topology=plan.topology))
    assert large.out_of_memory > plan.topology.chip.memory
    assert large.memory.total == pytest.approx(large.out_of_memory, rel=0.02)
    assert large.timing is None
    assert large.memory.buffers
