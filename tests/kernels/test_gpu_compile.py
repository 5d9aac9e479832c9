"""The tuned block sizes, compiled to machine code for GPUs: they fit shared memory, and main memory holds O(T)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="not installed: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt",
    ),
]


@pytest.mark.parametrize(
    ("backend", "chip", "num_cases"),
    [("triton", "a100", 12), ("triton", "h100", 12), ("triton", "gpu", 12), ("mosaic_gpu", "h100", 4)],
)
def test_compiles(backend, chip, num_cases):
    """In a process of its own, which knows of no platform but the CPU."""
    script = "tests.kernels.compile_for_gpu"
    command = [sys.executable, "-m", script, backend, chip]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 0, result.stderr[-3000:]
    cases = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(cases) == num_cases
    for case in cases:
        # Output, its gradient, log-sum-exp and the band of the relative bias: a few times the arguments, at any length.
        assert case["temporaries"] <= 6 * case["arguments"] + 2**24, case
