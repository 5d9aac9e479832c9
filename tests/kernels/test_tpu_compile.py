"""The tuned block sizes, compiled by the real TPU compiler: they fit vector memory, and main memory holds O(T)."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

MAIN_MEMORY_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "v7x": 96}
"""Of a JAX device, which on v7x is half a chip."""


@functools.cache
def compiled(chip):
    """In a process of its own, as libtpu reads its environment once. It fails where a kernel overflows its memory."""
    script = Path(__file__).with_name("compile_for_tpu.py")
    result = subprocess.run([sys.executable, script, chip], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("chip", MAIN_MEMORY_GIB)
def test_all_cases_compile_and_keep_little(chip):
    """The bound is a few times the arguments: less than scores [T, T], or partial sums per block of keys."""
    cases = compiled(chip)
    assert len(cases) >= 16
    for case in cases:
        assert case["temporaries"] <= case["bound"], case
        assert case["arguments"] + case["temporaries"] < MAIN_MEMORY_GIB[chip] * 2**30, case
