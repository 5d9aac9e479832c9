"""scripts/benchmarks/attention_gpu.py, as far as it goes without a GPU."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "benchmarks" / "attention_gpu.py"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it would run")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths=1024", "--head_dims=64"], "there is no GPU here, only cpu"),
        (["--masks=causal,band"], "--masks has band: give causal, full, or both"),
    ],
)
def test_says_why_it_cannot(arguments, message):
    result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
