import dataclasses
import pickle

import pytest

from t5x_like.errors import UserError
from t5x_like.planning import compile as planning
from t5x_like.planning.compile import CompilerCrash, compile_plan
from t5x_like.sharding.mesh import MeshConfig


def test_the_plan_of_a_small_run(cpu_plan):
    assert cpu_plan.source == "compiler"
    assert {axis: size for axis, size in cpu_plan.mesh.items() if size > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    assert (cpu_plan.tokens_per_step, cpu_plan.rows_per_device, cpu_plan.out_of_memory) == (128, 2.0, None)
    # Recomputation of chunks and products that are no parameters' (attention) come on top of the model's.
    assert cpu_plan.hardware_flops > 0.9 * cpu_plan.model_flops
    assert cpu_plan.timing is None
    assert "jax " in cpu_plan.versions


def test_a_mistake_in_the_configuration_comes_back_as_one(request_for_cpu):
    experiment = dataclasses.replace(request_for_cpu.experiment, mesh=MeshConfig(data=3))
    with pytest.raises(UserError, match="does not fill 8 devices"):
        compile_plan(dataclasses.replace(request_for_cpu, experiment=experiment))


def test_answers_are_remembered(request_for_cpu, cpu_plan, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "_ask", lambda request, directory: asked.append(request) or cpu_plan)
    assert compile_plan(request_for_cpu, tmp_path) == compile_plan(request_for_cpu, tmp_path) == cpu_plan
    other = dataclasses.replace(request_for_cpu, vocab_size=99)
    compile_plan(other, tmp_path)
    assert asked == [request_for_cpu, other]
    assert pickle.loads(next(tmp_path.glob("*.pickle")).read_bytes()).mesh == cpu_plan.mesh


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("ABORTED: libtpu is already in use by process 12. See /tmp/libtpu_lockfile", "remove /tmp/libtpu_lockfile"),
        ("RuntimeError: PJRT API version mismatch", r"pip install 't5x_like\[plan\]' 'jax\[tpu\]=="),
        ("jax.errors.JaxRuntimeError: INTERNAL: bad layout\n", r"failed \(exit code 1\): .*INTERNAL: bad layout"),
        ("", r"failed \(exit code 1\): it wrote nothing"),
    ],
)
def test_what_a_dead_compiler_says_is_explained(request_for_cpu, monkeypatch, log, message):
    def run(command, env, stdout, stderr, timeout):
        stdout.write(log.encode())
        return planning.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(planning.subprocess, "run", run)
    with pytest.raises(CompilerCrash, match=message):
        compile_plan(request_for_cpu)
