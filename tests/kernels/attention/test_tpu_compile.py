"""The tuned block sizes, compiled by the real TPU compiler: they fit vector memory, and main memory holds O(T)."""

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


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7x"])
def test_compiles(chip):
    """In a process of its own, as libtpu reads its environment once. It fails where a kernel overflows its memory."""
    script = Path(__file__).with_name("compile_for_tpu.py")
    result = subprocess.run([sys.executable, script, chip], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    cases = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(cases) >= 9
    for case in cases:
        # Output, its gradient, log-sum-exp, and the parts' sums in float32: a few times the arguments, at any length.
        assert case["temporaries"] <= 6 * case["arguments"] + 2**24, case
