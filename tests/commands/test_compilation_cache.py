"""A second start of the same run finds its compiled programs; processes of their own, as the cache is for."""

import os
import subprocess
import sys
from pathlib import Path

from tests import toy

ARGUMENTS = [
    *("--gin_file=runs/quickstart.gin", "--gin_file=data/text.gin", "--num_cpu_devices=1"),
    *("--gin.DataConfig.tokenizer=@ByteTokenizerConfig()", "--gin.SEQUENCE_LENGTH=16", "--gin.BATCH_SIZE=2"),
    *("--gin.DecoderConfig.d_model=16", "--gin.StackConfig.num_layers=1", "--gin.AttentionConfig.num_heads=2"),
    *("--gin.STEPS=1", "--gin.WARMUP_STEPS=1", "--gin.RunConfig.logging=@LoggingConfig()"),
    *("--gin.LoggingConfig.sample_tokens=0", "--gin.DataConfig.split='position'"),
]


def start(directory: Path, name: str) -> dict[str, int]:
    """Trains; returns the compiled steps in the cache with when they were written."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    places = [f"--gin.TEXT_FILES={directory / 'text.txt'}", f"--gin.MODEL_DIR={directory / name}"]
    command = [sys.executable, "-m", "t5x_like", "train", *ARGUMENTS, *places]
    cache = directory / "cache"
    done = subprocess.run([*command, f"--compilation_cache={cache}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("jit_train_step-*-cache")}


def test_the_second_start_compiles_nothing(tmp_path):
    toy.write_text(tmp_path)
    first = start(tmp_path, "a")
    assert len(first) == 1
    assert start(tmp_path, "b") == first
