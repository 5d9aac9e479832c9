"""How long a save holds training up, what its checksums cost, and how soon a stopped run trains again.

    python scripts/benchmarks/checkpoints.py

Trains two shapes in this process, the quickstart's and GPT-2's of 124 million parameters, with the steps before, during
and after an asynchronous save timed one by one; then starts, stops and restarts the quickstart as a user would.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.config import parse_config
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import compile_step, set_up
from t5x_like.training.state import initial_state

TOP = Path(__file__).resolve().parents[2]
SHAPES = {
    "quickstart": ("runs/quickstart.gin", ["MODEL_DIR='x'"], 2048, 20),
    "gpt2_124m": (
        "runs/gpt2_124m.gin",
        ["MODEL_DIR='x'", "TEXT_FILES='x'", "BATCH_SIZE=4", "SEQUENCE_LENGTH=128", "RunConfig.gradient_accumulation=1"],
        50304,
        4,
    ),
}
"""Run, settings, vocabulary, and how many steps before the save."""


def saving(name: str, directory: Path) -> None:
    """Prints the times of steps and of a save of one shape."""
    run, settings, vocab_size, num_steps = SHAPES[name]
    experiment = parse_config([run], settings).build(Experiment)
    job = set_up(experiment, build_mesh(experiment.mesh), vocab_size)
    state = initial_state(job.create_state, job.state)
    zeros = lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding)
    batch = jax.tree.map(zeros, job.batch)
    train_step = compile_step(job)
    checkpoints = Checkpoints(directory, CheckpointConfig())
    times: dict[str, list[float]] = {"before": [], "while it is written": []}

    def step(kind: str) -> None:
        nonlocal state
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        times[kind].append(time.perf_counter() - start)

    for _ in range(num_steps):
        step("before")
    start = time.perf_counter()
    checkpoints.save(1, state)
    stall = time.perf_counter() - start
    while not checkpoints.steps():
        step("while it is written")
    checkpoints.wait()
    whole = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    alone, meanwhile = statistics.median(times["before"][1:]), times["while it is written"]
    checking = checkpoints.seconds_checking
    print(
        f"{name}: {size / 1e6:,.0f} MB; a step takes {alone:.3f} s; the save holds training up for {stall:.3f} s "
        f"({stall / alone:.2f} steps); it is whole after {whole:.2f} s, of which checksums {checking:.3f} s "
        f"({checking / whole:.1%}); steps meanwhile take {statistics.mean(meanwhile) / alone:.2f} as long "
        f"({len(meanwhile)} of them)"
    )
    checkpoints.close()


def restarting(directory: Path) -> None:
    """Prints the seconds from the start of the command to the first step, of a fresh run and of the one resumed."""
    command = [sys.executable, "-m", "t5x_like", "train", "--gin_file=runs/quickstart.gin"]
    command += [f"--gin.MODEL_DIR={directory / 'run'}", f"--compilation_cache={directory / 'cache'}"]
    command += ["--gin.RunConfig.logging=@LoggingConfig()", "--gin.LoggingConfig.every_steps=1"]
    metrics = directory / "run" / "metrics.jsonl"
    for kind in ("first start", "resumed, compilation cache warm"):
        records = metrics.read_text().count("\n") if metrics.exists() else 0
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=TOP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not metrics.exists() or metrics.read_text().count("\n") <= records:
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        process.wait()
        goodput = json.loads((directory / "run" / "goodput.json").read_text())["seconds"]
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in goodput.items() if name in ("init", "compile"))
        print(f"{kind}: first step recorded after {seconds:.1f} s (of all starts so far: {parts})")


def main() -> None:
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as directory:
        for name in SHAPES:
            saving(name, Path(directory) / name)
        restarting(Path(directory))


if __name__ == "__main__":
    main()
