"""A mixture of experts on eight TPU chips, compiled by the real TPU compiler: its exchanges are what they say."""

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


def test_exchanges_compile():
    """In a process of its own, as libtpu reads its environment once."""
    script = Path(__file__).with_name("compile_moe_for_tpu.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    cases = {case["case"]: case for case in map(json.loads, result.stdout.splitlines())}
    assert cases["ragged_all_to_all, buffer"]["collectives"]["ragged-all-to-all"] == 4
    assert "all-gather" not in cases["ragged_all_to_all, buffer"]["collectives"]
    assert cases["capacity"]["collectives"]["all-to-all"] == 4
    # The buffer bounds what the worst case would need.
    assert cases["ragged_all_to_all, buffer"]["temporaries"] < 0.3 * cases["ragged_all_to_all"]["temporaries"]
