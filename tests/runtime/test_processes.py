"""Several processes on loopback that train together, as users start them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.reporting.metrics import read_metrics
from t5x_like.runtime import processes
from t5x_like.runtime.processes import Meeting
from t5x_like.sharding.logical import local_rows, on_devices
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import Placement
from t5x_like.training.job import batch_target
from tests import toy

TOP = Path(__file__).parents[2]
TINY = {
    "STEPS": 6,
    "BATCH_SIZE": 8,
    "SEQUENCE_LENGTH": 16,
    "WARMUP_STEPS": 2,
    "DecoderConfig.d_model": 16,
    "StackConfig.num_layers": 2,
    "MLPConfig.d_ff": 32,
    "RunConfig.evaluate_every_steps": 6,
    "RunConfig.logging": "@LoggingConfig()",
    "LoggingConfig.every_steps": 1,
    "LoggingConfig.tensorboard": False,
    "CheckpointConfig.save_every_steps": 3,
    "MeshConfig.fsdp": 2,
}
CACHE = {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"], "MPLBACKEND": "Agg"}


def flags(directory: Path, **changes) -> list[str]:
    bindings = {**TINY, "TEXT_FILES": directory / "text.txt", "MODEL_DIR": directory / "run", **changes}
    return ["train", "--gin_file=runs/nanogpt_char.gin", *(f"--gin.{name}={value}" for name, value in bindings.items())]


def python(*arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=TOP, env={**os.environ, **CACHE}, **pipes)


def output_of(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=900)[0]
    finally:
        for _ in range(2):  # the launcher ends its processes by force when it is told twice
            if process.poll() is None:
                process.terminate()
                time.sleep(1)


def launch(directory: Path, num_processes: int, *more: str, devices: int = 4) -> tuple[int, str]:
    """Trains on as many devices in any number of processes; exit code and output."""
    options = [f"--num_processes={num_processes}", f"--devices_per_process={devices // num_processes}"]
    process = python("scripts/launch_local.py", *options, "--", *flags(directory), *more)
    output = output_of(process)
    return process.returncode, output


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(directory / "run" / "metrics.jsonl")]


@pytest.fixture
def directory(tmp_path):
    toy.write_text(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """The run of a single process."""
    directory = tmp_path_factory.mktemp("one")
    toy.write_text(directory)
    code, output = launch(directory, 1)
    assert code == 0, output
    assert len(losses(directory)) == 7
    return directory


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    toy.write_text(directory)
    code, output = launch(directory, 2)
    assert code == 0, output
    assert output.count("Training complete at step 6.") == 1, "only process 0 speaks"
    return directory


@pytest.mark.multiprocess
def test_two_processes_train_like_one(by_one, by_two):
    np.testing.assert_allclose(losses(by_two), losses(by_one), rtol=1e-6)


@pytest.mark.multiprocess
def test_four_processes_train_like_one(by_one, directory):
    code, output = launch(directory, 4)
    assert code == 0, output
    np.testing.assert_allclose(losses(directory), losses(by_one), rtol=1e-6)


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_processes", [1, 4])
def test_another_number_of_processes_goes_on_from_a_checkpoint(by_two, num_processes, tmp_path):
    for name in ("text.txt", "run"):
        (shutil.copytree if name == "run" else shutil.copy)(by_two / name, tmp_path / name)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    more = [f"--gin.TEXT_FILES={by_two}/text.txt"]  # part of what may not change within a run
    code, output = launch(tmp_path, num_processes, *more)
    assert code == 0, output
    assert "step 4/6" in output
    assert "step 3/6" not in output
    np.testing.assert_allclose(losses(tmp_path), losses(by_two), rtol=1e-6)


def start_two(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit codes and outputs of two processes, each with a command of its own."""
    port = np.random.default_rng(os.getpid()).integers(20_000, 60_000)
    meeting = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", "--num_cpu_devices=1"]
    started = [python("-m", "t5x_like", *c, *meeting, f"--process_id={i}") for i, c in enumerate(commands)]
    outputs = [output_of(process) for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


@pytest.mark.multiprocess
def test_processes_that_disagree_are_refused(directory):
    changed = flags(directory, STEPS=8)
    results = start_two(flags(directory), changed)
    assert [code for code, _ in results] == [2, 2], results
    said = results[0][1] + results[1][1]
    assert said.count("error:") == 1
    assert "Process 1 was started with another configuration than process 0:\n  experiment.run.steps: 6 -> 8" in said
    assert not (directory / "run").exists()


@pytest.mark.multiprocess
def test_a_failure_in_one_stops_all(directory, monkeypatch):
    plugin = "import jax\nfrom t5x_like.training import loop\noriginal = loop.Reporter.advance\n"
    plugin += "def advance(self, step, metrics):\n    original(self, step, metrics)\n"
    plugin += "    if jax.process_index() == 1 and step == 2:\n        raise RuntimeError('a bug')\n"
    plugin += "loop.Reporter.advance = advance\n"
    (directory / "broken.py").write_text(plugin)
    monkeypatch.setenv("PYTHONPATH", f"{directory}:{os.environ.get('PYTHONPATH', '')}")
    code, output = launch(directory, 2, "--plugin=broken")
    assert code == 1, output
    assert output.count("RuntimeError: a bug") == 1
    assert output.count("Traceback") == 1
    assert "[1] Process 1 of 2 ends after this error, and the others with it." in output


@pytest.mark.parametrize(
    ("meeting", "message"),
    [
        (Meeting("127.0.0.1:1"), "--num_processes, --process_id missing: give all of"),
        (Meeting("127.0.0.1:1", 2, 2), r"--process_id is 2 of --num_processes=2: give 0 to 1\."),
    ],
)
def test_meetings_that_cannot_be_are_refused(meeting, message):
    with pytest.raises(UserError, match=message):
        processes.join(meeting)


def test_the_environment_tells_of_a_meeting(monkeypatch):
    for name, value in (("COORDINATOR_ADDRESS", "host:1"), ("NUM_PROCESSES", "4"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert processes._completed(Meeting(process_id=3))[:3] == ("host:1", 4, 3)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'four': give a number"):
        processes._completed(Meeting())


def test_one_process_meets_nobody(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: pytest.fail("it waits"))
    processes.join(Meeting())
    processes.join(Meeting("127.0.0.1:1", 1, 0))


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"data": 2, "sequence": 4}, {"data": 1, "tensor": 8}])
def test_a_process_sends_its_own_rows(sizes, monkeypatch, tmp_path):
    """As if the devices 2 to 5 were those of this process."""
    mesh = build_mesh(MeshConfig(**sizes))
    target = batch_target(toy.experiment(tmp_path).data, Placement(mesh))
    whole = toy.batch()
    expected = on_devices(whole, target)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    every = target["decoder_input_tokens"].sharding.devices_indices_map((toy.BATCH, toy.LENGTH))
    mine = {device: share for device, share in every.items() if device.id in range(2, 6)}
    kind = type(target["decoder_input_tokens"].sharding)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "addressable_devices_indices_map", lambda self, shape: mine)
        rows = local_rows(target)
    assert set(rows) == {row for share in mine.values() for row in range(toy.BATCH)[share[0]]}
    ours = on_devices({name: array[local_rows(target)] for name, array in whole.items()}, target)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.sharding == expected[name].sharding


def test_the_launcher_needs_a_command():
    command = [sys.executable, "scripts/launch_local.py", "--num_processes=2"]
    result = subprocess.run(command, cwd=TOP, capture_output=True, check=False)
    assert result.returncode == 2
    assert b"required: command" in result.stderr
