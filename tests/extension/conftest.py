"""Parts of a user's own: a plugin module of at most 40 lines, and toy runs of 20 steps that use it from the flags."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from t5x_like.commands.main import main
from t5x_like.configurable import REGISTRY
from t5x_like.data import tokenizers
from t5x_like.reporting.metrics import read_metrics
from tests import toy

STEPS = 20
TOY = {
    "STEPS": STEPS,
    "BATCH_SIZE": 8,
    "SEQUENCE_LENGTH": 16,
    "LEARNING_RATE": 0.01,
    "WARMUP_STEPS": 2,
    "DecoderConfig.d_model": 16,
    "StackConfig.num_layers": 2,
    "StackConfig.scan_layers": True,
    "MLPConfig.d_ff": 32,
    "RunConfig.evaluate_every_steps": STEPS,
    "RunConfig.evaluate_num_batches": 1,
    "CheckpointConfig.save_every_steps": STEPS,
    "LoggingConfig.every_steps": 1,
    "LoggingConfig.tensorboard": False,
    "LoggingConfig.progress": False,
    "LoggingConfig.sample_tokens": 0,
}


@pytest.fixture(params=["data_tensor", "stage"])
def mesh(request, monkeypatch) -> dict[str, int]:
    """Bindings of a mesh, and no more devices than it has."""
    sizes = {"data": 2, "tensor": 2} if request.param == "data_tensor" else {"data": 1, "stage": 2}
    devices = jax.devices()[: math.prod(sizes.values())]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    pipeline = {"PipelineConfig.num_microbatches": 2} if "stage" in sizes else {}
    return {**{f"MeshConfig.{axis}": size for axis, size in sizes.items()}, **pipeline}


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Callable[[str], str]:
    """A function from the text of a module to the flag that loads it; what the module registers goes with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)

    def write(text: str) -> str:
        assert len(text.splitlines()) <= 40
        Path("my_parts.py").write_text(text)
        importlib.invalidate_caches()
        return "--plugin=my_parts"

    yield write
    for registry in (REGISTRY, tokenizers.KINDS):
        for name in [name for name, cls in registry.items() if cls.__module__ == "my_parts"]:
            del registry[name]
    sys.modules.pop("my_parts", None)


@pytest.fixture
def train(tmp_path, plugin, mesh) -> Callable[..., list[dict[str, Any]]]:
    """A function that trains a toy run with a plugin and returns its records of training.

    Bindings change the run; None takes one back.
    """

    def run(text: str, **bindings: Any) -> list[dict[str, Any]]:
        toy.write_text(tmp_path)
        settings = {"MODEL_DIR": tmp_path / "run", "TEXT_FILES": tmp_path / "text.txt", **TOY, **mesh, **bindings}
        flags = [f"--gin.{name}={value}" for name, value in settings.items() if value is not None]
        assert main(["train", plugin(text), "--gin_file=runs/nanogpt_char.gin", *flags]) == 0
        records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r.get("split") == "train"]
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert records[-1]["loss"] < records[0]["loss"]
        return records

    return run
