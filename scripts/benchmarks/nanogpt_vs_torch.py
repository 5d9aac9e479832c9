"""Times a training step of nanoGPT's shakespeare_char CPU recipe here and in eager PyTorch, as a markdown table.

    pip install torch==2.13.0
    python scripts/benchmarks/nanogpt_vs_torch.py

Each side trains in a process of its own; the two take turns in short blocks, so that both meet the same load on the
machine, and the ratio is that of neighbouring blocks. A step includes making its batch. PyTorch runs as nanoGPT does
without `torch.compile`, once with each of its implementations of AdamW. Run it on an otherwise idle machine: PyTorch's
threads wait for each other and suffer most from company.
"""

import math
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from absl import app, flags

BLOCKS = flags.DEFINE_integer("blocks", 20, "Turns of each side.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 20, "Training steps in a turn.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "Threads of PyTorch; XLA takes one per core.")
BINDINGS = flags.DEFINE_multi_string("gin", [], "A binding NAME=VALUE over runs/nanogpt_char.gin; may be repeated.")
WORKER = flags.DEFINE_string("worker", None, "Be this side of the comparison (used by the script itself).")

NUM_LAYERS, NUM_HEADS, D_MODEL, LENGTH, BATCH = 4, 4, 128, 64, 12
CHARACTERS = (string.ascii_letters + string.punctuation)[:65]
TEXT_LENGTH = 1_000_000

Run = Callable[[int], float]
"""Takes that many training steps and returns the last loss."""


def t5x_like_run() -> Iterator[Run]:
    """This package's step, as `t5x_like train` takes it, on random text of 65 characters."""
    from t5x_like.config import parse_config
    from t5x_like.data.build import build_data
    from t5x_like.data.loader import Loader, device_prefetch
    from t5x_like.sharding.logical import on_devices
    from t5x_like.sharding.mesh import build_mesh
    from t5x_like.training.experiment import Experiment
    from t5x_like.training.job import compile_step, set_up
    from t5x_like.training.state import initial_state

    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory, "text.txt")
        text.write_text("".join(random.Random(0).choices(CHARACTERS, k=TEXT_LENGTH)))
        bindings = [f"TEXT_FILES={str(text)!r}", f"MODEL_DIR={directory!r}", *BINDINGS.value]
        experiment = parse_config(["runs/nanogpt_char.gin"], bindings).build(Experiment)
        data = build_data(experiment.data, None)
    mesh = build_mesh(experiment.mesh)
    job = set_up(experiment, mesh, data.tokenizer.vocab_size)
    with job.placement.use(), Loader(data.train.batch, 0, sys.maxsize) as loader:
        step, state = compile_step(job), initial_state(job.create_state, job.state)
        batches = device_prefetch(loader, lambda batch: on_devices(batch, job.batch))

        def run(num_steps: int) -> float:
            nonlocal state
            for _ in range(num_steps):
                state, metrics = step(state, next(batches)[1])
            return float(metrics["loss"])

        yield run


def torch_run(adamw: dict[str, bool]) -> Iterator[Run]:
    """NanoGPT's step in eager PyTorch."""
    import torch

    torch.set_num_threads(THREADS.value)
    torch.manual_seed(0)
    model = torch_gpt()
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), **adamw)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(len(CHARACTERS), size=TEXT_LENGTH))

    def run(num_steps: int) -> float:
        for _ in range(num_steps):
            starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
            inputs = torch.stack([tokens[start : start + LENGTH] for start in starts])
            targets = torch.stack([tokens[start + 1 : start + 1 + LENGTH] for start in starts])
            loss = model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    yield run


def torch_gpt():
    """NanoGPT's model with `bias=False` and `dropout=0`: maps (inputs, targets) to the loss."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D_MODEL))

        def forward(self, x):
            return functional.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False)
            self.out = nn.Linear(D_MODEL, D_MODEL, bias=False)

        def forward(self, x):
            heads = (*x.shape[:2], NUM_HEADS, D_MODEL // NUM_HEADS)
            q, k, v = (y.view(heads).transpose(1, 2) for y in self.qkv(x).split(D_MODEL, dim=2))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).contiguous().view(x.shape))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Sequential(Norm(), Attention())
            up, down = nn.Linear(D_MODEL, 4 * D_MODEL, bias=False), nn.Linear(4 * D_MODEL, D_MODEL, bias=False)
            self.feedforward = nn.Sequential(Norm(), up, nn.GELU(), down)
            for residual in (self.attention[1].out, down):
                nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * NUM_LAYERS))
            for linear in (self.attention[1].qkv, up):
                nn.init.normal_(linear.weight, std=0.02)

        def forward(self, x):
            x = x + self.attention(x)
            return x + self.feedforward(x)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(len(CHARACTERS), D_MODEL), nn.Embedding(LENGTH, D_MODEL)
            for embedding in (self.tokens, self.positions):
                nn.init.normal_(embedding.weight, std=0.02)
            self.blocks = nn.Sequential(*[Block() for _ in range(NUM_LAYERS)], Norm())

        def forward(self, inputs, targets):
            x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
            logits = functional.linear(self.blocks(x), self.tokens.weight)
            return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    return GPT()


SIDES: dict[str, Callable[[], Iterator[Run]]] = {
    "t5x_like": t5x_like_run,
    "PyTorch, AdamW foreach": lambda: torch_run({"foreach": True}),
    "PyTorch, AdamW fused": lambda: torch_run({"fused": True}),
}


def work(side: str) -> None:
    """Answers each number of steps on stdin with the seconds they took, on stdout."""
    for run in SIDES[side]():
        for line in sys.stdin:
            start = time.perf_counter()
            loss = run(int(line))
            print(time.perf_counter() - start, flush=True)
            assert math.isfinite(loss), f"{side} diverged"


class Worker:
    """The process of one side."""

    def __init__(self, side: str):
        command = [sys.executable, *sys.argv, f"--worker={side}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def milliseconds_per_step(self, steps: int) -> float:
        print(steps, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("error: a side of the comparison has failed; its own message is above")
        return 1000 * float(answer) / steps

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main(argv: list[str]) -> None:
    del argv
    if WORKER.value:
        work(WORKER.value)
        return
    workers = {side: Worker(side) for side in SIDES}
    for worker in workers.values():
        worker.milliseconds_per_step(STEPS.value)  # compiles, and warms up
    blocks = [
        {side: worker.milliseconds_per_step(STEPS.value) for side, worker in workers.items()}
        for _ in range(BLOCKS.value)
    ]
    for worker in workers.values():
        worker.close()

    medians = {side: statistics.median(block[side] for block in blocks) for side in SIDES}
    rival = min((side for side in SIDES if side != "t5x_like"), key=medians.get)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch"))
    print(f"{versions}; {os.cpu_count()} cores, {THREADS.value} threads of PyTorch;")
    print(f"{BLOCKS.value} blocks of {STEPS.value} steps; ratios are to {rival}, the faster one, block by block.")
    print()
    print("| side | ms/step, median | ms/step, best block | ratio, median |")
    print("|:--|--:|--:|--:|")
    for side in SIDES:
        ratio = statistics.median(block[side] / block[rival] for block in blocks)
        best = min(block[side] for block in blocks)
        print(f"| {side} | {medians[side]:.1f} | {best:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    app.run(main)
