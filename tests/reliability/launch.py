"""Starts workers and looks after them."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from t5x_like.reporting.metrics import read_metrics

TOP = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def workers(directory: Path, processes: int, **options) -> Iterator[list[subprocess.Popen]]:
    """The processes of one training; those that still run at the end are killed."""
    port = free_port()
    settings = [
        {"directory": str(directory), "process": i, "processes": processes, "port": port, **options}
        for i in range(processes)
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.worker", json.dumps(setting)],
            cwd=TOP,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for setting in settings
    ]
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()


def run(directory: Path, processes: int, seconds: float = 300, **options) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of all processes of one training."""
    with workers(directory, processes, **options) as started:
        outputs = [process.communicate(timeout=seconds)[0] for process in started]
        return [process.returncode for process in started], outputs


def losses(directory: Path) -> dict[int, float]:
    records = read_metrics(directory / "run" / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if record["split"] == "train"}


def saved_steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "run" / "checkpoints").iterdir())
