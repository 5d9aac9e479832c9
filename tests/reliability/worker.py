"""One process of a training of several, with faults: python -m tests.reliability.worker '{"directory": ..., ...}'."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.data.build import build_data
from t5x_like.runtime.coordination import leave
from t5x_like.runtime.processes import Meeting, first_ahead, join
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training import loop
from t5x_like.training.guards import GuardConfig
from t5x_like.training.job import set_up
from tests import toy


def start(process: int, processes: int, port: int, devices: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if processes > 1:
        join(Meeting(f"127.0.0.1:{port}", processes, process, start_seconds=300, heartbeat_seconds=10))


def inject(fault: dict, process: int) -> None:
    """Lets `fault["does"]` happen in one process, when it has dispatched `fault["step"]`."""
    original = loop.Reporter.advance

    def advance(self, step, metrics):
        original(self, step, metrics)
        print(f"step {step}", flush=True)
        if fault and process == fault["process"] and step == fault["step"]:
            if fault["does"] == "hang":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, fault["does"]))

    loop.Reporter.advance = advance


def main(
    directory: str,
    process: int = 0,
    processes: int = 1,
    port: int = 0,
    devices: int = 2,
    steps: int = 8,
    fault: dict | None = None,
    hang_seconds: float = 600.0,
    save_every_steps: int = 4,
) -> None:
    start(process, processes, port, devices)
    inject(fault or {}, process)
    experiment = toy.experiment(
        Path(directory),
        mesh=MeshConfig(data=-1, fsdp=2),
        steps=steps,
        evaluate_every_steps=steps,
        checkpoints=CheckpointConfig(save_every_steps=save_every_steps, keep_last=10),
        guard=GuardConfig(hang_minutes=hang_seconds / 60, compare_replicas_every_steps=3),
    )
    run = RunDirectory(experiment.run.model_dir)
    try:
        with contextlib.ExitStack() as stack:
            with first_ahead("data"):
                if process == 0:
                    stack.enter_context(run.writing())
                data = build_data(experiment.data, run.data)
            job = set_up(experiment, build_mesh(experiment.mesh), data.tokenizer.vocab_size)
            outcome = loop.train(experiment, job, data, run)
            print(outcome.reason, flush=True)
    except Exception as error:
        if processes > 1:
            leave(error)
        raise


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
