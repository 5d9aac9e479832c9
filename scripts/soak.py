"""Kills a training again and again at random moments, and compares the outcome with that of an uninterrupted run.

    python scripts/soak.py --kills=100

A model of a few thousand parameters is trained by `t5x_like train --restarts` in a process of its own, which the
supervisor starts again after each `kill -9`. Half of the kills come at any moment; the others while a checkpoint is
being written. In the end the trace of losses and every array of the last checkpoint must equal, bit for bit, those of
the run that was left alone. Exit code 0: they do.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flax import traverse_util

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.policy import CheckpointConfig

TOP = Path(__file__).resolve().parents[1]
SETTINGS = {
    "BATCH_SIZE": 8,
    "SEQUENCE_LENGTH": 16,
    "WARMUP_STEPS": 2,
    "DecoderConfig.d_model": 32,
    "StackConfig.num_layers": 2,
    "MLPConfig.d_ff": 64,
    "RunConfig.ema_decay": 0.99,
    "RunConfig.logging": "@LoggingConfig()",
    "LoggingConfig.every_steps": 1,
    "LoggingConfig.tensorboard": False,
    "LoggingConfig.sample_tokens": 0,
    "LoggingConfig.progress": False,
    "CheckpointConfig.keep_last": 3,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps_per_kill", type=int, default=25, help="length of the run, in steps for each kill")
    parser.add_argument("--save_every_steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--directory", type=Path, default=None, help="default: a temporary one")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "text.txt")
    whole, killed = directory / "whole", directory / "killed"

    start = time.monotonic()
    subprocess.run(
        command(directory, whole, options), check=True, env=environment(directory), stdout=subprocess.DEVNULL
    )
    alone = time.monotonic() - start
    kills = Soak(killed, options).run(command(directory, killed, options), environment(directory))
    problems = differences(whole, killed)
    print(report(whole, killed, kills, alone, time.monotonic() - start - alone, problems))
    return 1 if problems else 0


def command(directory: Path, model_dir: Path, options: argparse.Namespace) -> list[str]:
    settings = SETTINGS | {
        "TEXT_FILES": directory / "text.txt",
        "MODEL_DIR": model_dir,
        "STEPS": options.kills * options.steps_per_kill,
        "RunConfig.evaluate_every_steps": 10 * options.save_every_steps,
        "CheckpointConfig.save_every_steps": options.save_every_steps,
    }
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    files = ["--gin_file=runs/nanogpt_char.gin", "--num_cpu_devices=2", "--restarts=50"]
    return [sys.executable, "-m", "t5x_like", "train", *files, *flags]


def environment(directory: Path) -> dict[str, str]:
    # Compiled once for all starts.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return {**os.environ, **cache, "PYTHONPATH": str(TOP)}


class Soak:
    """Kills the process that trains, which is the supervisor's child, so many times."""

    def __init__(self, model_dir: Path, options: argparse.Namespace):
        self._model_dir, self._options = model_dir, options
        self._random = random.Random(options.seed)

    def run(self, command: list[str], environment: dict[str, str]) -> list[dict]:
        supervisor = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kills: list[dict] = []
        try:
            while len(kills) < self._options.kills:
                trainer = self._next_trainer(supervisor, kills[-1]["trainer"] if kills else None)
                if trainer is None:
                    break
                kills.append(self._kill(trainer, supervisor, in_a_save=len(kills) % 2 == 1))
                print(f"kill {len(kills)}: {kills[-1]}", flush=True)
            if supervisor.wait() != 0:
                raise SystemExit(f"the supervisor ended with code {supervisor.returncode}")
        finally:
            if supervisor.poll() is None:
                supervisor.terminate()
        return kills

    def _next_trainer(self, supervisor: subprocess.Popen, former: int | None) -> int | None:
        """The process id of the next trainer; None if the run ended instead."""
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        while supervisor.poll() is None:
            for child in children.read_text().split():
                if int(child) != former:
                    return int(child)
            time.sleep(0.02)
        return None

    def _kill(self, trainer: int, supervisor: subprocess.Popen, in_a_save: bool) -> dict:
        """Kills after a random number of steps from the newest checkpoint on, or during the save that follows them.

        In steps, not in seconds, so that it means the same on a busy machine; one in ten hits the start itself.
        """
        leftovers = self._half_written()
        if self._random.random() < 0.1:
            time.sleep(self._random.uniform(0, 5))
        else:
            self._wait_for_steps(supervisor, self._random.randrange(1, 3 * self._options.save_every_steps))
            if in_a_save:
                self._wait_for_save(supervisor, leftovers)
            time.sleep(self._random.uniform(0, 0.03))
        writing = bool(self._half_written() - leftovers)
        try:
            os.kill(trainer, signal.SIGKILL)
        except ProcessLookupError:  # It had just ended.
            writing = False
        return {"trainer": trainer, "step": last_step(self._model_dir), "in a save": writing}

    def _wait_for_steps(self, supervisor: subprocess.Popen, steps: int) -> None:
        """Waits until the trainer is so many steps past the newest checkpoint it started from."""
        complete = (self._model_dir / "checkpoints").glob("*/checksums-0-of-1.json")
        begin = max((int(path.parent.name) for path in complete if path.parent.name.isdecimal()), default=0)
        # Records after the checkpoint are dropped when training goes on: only then do they count.
        while supervisor.poll() is None and last_step(self._model_dir) > begin:
            time.sleep(0.02)
        while supervisor.poll() is None and last_step(self._model_dir) < begin + steps:
            time.sleep(0.002)

    def _wait_for_save(self, supervisor: subprocess.Popen, leftovers: set[int]) -> None:
        while supervisor.poll() is None and not self._half_written() - leftovers:
            time.sleep(0.0005)

    def _half_written(self) -> set[int]:
        """Inodes of checkpoints that are being written, or were when a kill came."""
        found = set()
        for path in (self._model_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):  # Complete by now.
                found.add(path.stat().st_ino)
        return found


def last_step(model_dir: Path) -> int:
    """The step of the last whole record of metrics."""
    path = model_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4000, 0))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def differences(whole: Path, killed: Path) -> list[str]:
    """What is not equal: records of metrics (without those of speed), or arrays of the last checkpoint."""
    problems = []
    traces = [trace(path) for path in (whole, killed)]
    if traces[0] != traces[1]:
        first = next((i for i, pair in enumerate(zip(*traces, strict=False)) if pair[0] != pair[1]), "the end")
        problems.append(f"the traces differ from record {first} on")
    states = [last_state(path) for path in (whole, killed)]
    if set(states[0]) != set(states[1]):
        return [*problems, "the last checkpoints are of other steps or arrays"]
    return problems + [f"{name} differs" for name in states[0] if states[0][name] != states[1][name]]


def last_state(model_dir: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, verified, by step and name."""
    checkpoints = Checkpoints(model_dir / "checkpoints", CheckpointConfig())
    step = checkpoints.newest_good()
    arrays = checkpoints.restore(traverse_util.unflatten_dict(checkpoints.arrays(step)), step)
    return {
        f"{step}/{'/'.join(name)}": np.asarray(x).tobytes() for name, x in traverse_util.flatten_dict(arrays).items()
    }


def trace(model_dir: Path) -> list[dict]:
    speed = {"tokens_per_second", "seconds_per_step", "waiting_for_data", "mfu"}
    records = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in speed} for record in records]


def report(whole: Path, killed: Path, kills: list[dict], alone: float, soaked: float, problems: list[str]) -> str:
    goodput = json.loads((killed / "goodput.json").read_text())
    in_saves = sum(kill["in a save"] for kill in kills)
    lines = [
        f"{len(kills)} kills, {in_saves} of them while a checkpoint was being written; {goodput['starts']} starts",
        f"compared: {len(trace(whole))} records of metrics, and every array of the last checkpoint",
        f"uninterrupted {alone:.0f} s, with kills {soaked:.0f} s, of which steps done again "
        f"{goodput['seconds']['lost']:.0f} s, starting up {goodput['seconds']['init']:.0f} s",
        "differences: " + ("; ".join(problems[:5]) if problems else "none, bit for bit"),
    ]
    return "\n".join(lines)


def write_text(path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "from", "dog"]
    path.write_text(" ".join(words[i] for i in rng.choice(len(words), 4000, p=np.arange(1, 14) / 91)))


if __name__ == "__main__":
    sys.exit(main())
