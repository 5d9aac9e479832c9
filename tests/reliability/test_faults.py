"""Faults in trainings of several real processes, which talk over loopback."""

import signal
import time

import numpy as np
import pytest

from tests import toy
from tests.reliability.launch import losses, run, saved_steps, workers

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of an uninterrupted run of two processes."""
    directory = tmp_path_factory.mktemp("whole")
    toy.write_text(directory)
    codes, outputs = run(directory, 2)
    assert codes == [0, 0], outputs
    assert saved_steps(directory) == [4, 8]
    return losses(directory)


@pytest.fixture
def directory(tmp_path):
    toy.write_text(tmp_path)
    return tmp_path


@pytest.mark.parametrize("process", [0, 1])
def test_sigterm_to_one_process_saves_one_step_in_both_and_the_run_goes_on_from_it(directory, whole, process):
    codes, outputs = run(directory, 2, fault={"process": process, "step": 2, "does": "SIGTERM"})
    assert codes == [0, 0], outputs
    [step] = saved_steps(directory)
    assert all(f"interrupted at step {step}" in output for output in outputs)
    codes, outputs = run(directory, 2)
    assert codes == [0, 0], outputs
    assert losses(directory) == whole


def test_ctrl_c_to_one_process_stops_both(directory):
    codes, outputs = run(directory, 2, steps=400, fault={"process": 1, "step": 2, "does": "SIGINT"})
    assert codes == [0, 0], outputs
    assert all("interrupted at step" in output for output in outputs)


@pytest.mark.parametrize("process", [0, 1])
def test_kill_of_one_process_ends_the_other_in_seconds_and_the_run_resumes(directory, whole, process):
    with workers(directory, 2, fault={"process": process, "step": 6, "does": "SIGKILL"}) as started:
        assert started[process].wait(300) == -signal.SIGKILL
        start = time.monotonic()
        other = started[1 - process]
        output = other.communicate(timeout=60)[0]
        assert time.monotonic() - start < 10 + 5, "heartbeat + 5 s"
        assert other.returncode not in (0, 2), output
    codes, outputs = run(directory, 2)
    assert codes == [0, 0], outputs
    assert losses(directory) == whole


def test_a_peer_that_hangs_ends_both_by_the_watchdog(directory, whole):
    codes, outputs = run(directory, 2, hang_seconds=20, fault={"process": 1, "step": 6, "does": "hang"})
    assert codes[1] == 1
    assert codes[0] not in (0, 2)
    assert "Timeout (0:00:20" in outputs[1]
    assert "time.sleep(600)" in outputs[1] or "in advance" in outputs[1], "the stacks show where"
    codes, outputs = run(directory, 2)
    assert codes == [0, 0], outputs
    assert losses(directory) == whole


@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (1, 2), (1, 8), (2, 4), (4, 1)])
def test_a_run_of_two_processes_resumes_on_other_numbers_of_processes_and_devices(directory, whole, processes, devices):
    codes, outputs = run(directory, 2, fault={"process": 0, "step": 3, "does": "SIGTERM"})
    assert codes == [0, 0], outputs
    codes, outputs = run(directory, processes, devices=devices)
    assert codes == [0] * processes, outputs
    np.testing.assert_allclose(list(losses(directory).values()), list(whole.values()), rtol=1e-5)


def test_a_request_in_the_first_process_is_answered_by_both(directory):
    codes, outputs = run(directory, 2, fault={"process": 0, "step": 2, "does": "SIGUSR1"}, save_every_steps=100)
    assert codes == [0, 0], outputs
    assert saved_steps(directory) in ([2, 8], [3, 8])


@pytest.mark.parametrize("harmed", ["ocdbt.process_1", "checksums-1-of-2.json"])
def test_damage_that_one_process_finds_is_known_to_both(directory, whole, harmed):
    codes, outputs = run(directory, 2)
    assert codes == [0, 0], outputs
    newest = directory / "run" / "checkpoints" / "8"
    path = max((p for p in newest.rglob("*") if harmed in str(p) and p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 2
    path.write_bytes(content)
    codes, outputs = run(directory, 2)
    assert codes == [0, 0], outputs
    assert all("Checkpoint 8 is damaged" in output for output in outputs)
    assert losses(directory) == whole
    assert (newest.parent / "8.damaged").exists()
