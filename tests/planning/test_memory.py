"""Memory of a small run on virtual CPU devices against the compiler's own numbers, asked for in this process."""

import jax
import pytest

from t5x_like.planning.memory import exact_parts
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.job import compile_step, set_up


@pytest.fixture(scope="module")
def stats(request_for_cpu):
    mesh = build_mesh(request_for_cpu.experiment.mesh, jax.devices()[:8])
    job = set_up(request_for_cpu.experiment, mesh, request_for_cpu.vocab_size)
    return job, compile_step(job).memory_analysis()


def test_what_the_step_is_given_is_exactly_what_the_compiler_says(cpu_plan, stats):
    job, compiler = stats
    assert cpu_plan.memory.exact == exact_parts(job)
    assert set(cpu_plan.memory.exact) == {"parameters", "optimizer state", "averaged parameters", "batch"}
    assert sum(cpu_plan.memory.exact.values()) == cpu_plan.memory.arguments == compiler.argument_size_in_bytes


def test_the_total_is_the_compilers(cpu_plan, stats):
    compiler = stats[1]
    needed = compiler.argument_size_in_bytes + compiler.output_size_in_bytes - compiler.alias_size_in_bytes
    assert cpu_plan.memory.total == pytest.approx(needed + compiler.temp_size_in_bytes, rel=0.01)
    assert sum(cpu_plan.memory.working.values()) + cpu_plan.memory.arguments == cpu_plan.memory.total


def test_kinds_of_memory(cpu_plan):
    """Gradients of two microbatches are summed in arrays of the parameters' size; activations are kept beside them."""
    assert cpu_plan.memory.working["gradients"] >= cpu_plan.memory.exact["parameters"]
    assert cpu_plan.memory.working["activations"] > 0
    assert cpu_plan.memory.buffers == sorted(cpu_plan.memory.buffers, key=lambda b: -b.bytes)
    assert any("cross_entropy" in buffer.scope for buffer in cpu_plan.memory.buffers)
