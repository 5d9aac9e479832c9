"""scripts/benchmarks/attention_gpu.py, as far as it goes without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags

from t5x_like.kernels.target import compiling_for

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


def test_every_cell_is_a_call_that_an_h100_can_do(monkeypatch, capsys):
    """Calls are traced, not run; but not those of cuDNN, which is not installed here."""
    spec = importlib.util.spec_from_file_location("attention_gpu", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags.FLAGS(
        [
            "attention_gpu",
            "--lengths=256",
            "--tokens=512",
            "--d_model=256",
            "--masks=causal",
            "--backends=mosaic_gpu,triton",
        ]
    )

    def seconds(function, *arrays):
        jax.eval_shape(function, *arrays)
        return 1.0

    monkeypatch.setattr(script, "seconds", seconds)
    monkeypatch.setattr(script, "qkv", lambda *args, qkv=script.qkv: jax.eval_shape(lambda: qkv(*args)))
    with compiling_for("h100"):
        script.print_plain(1e12)
        script.print_biased(1e12)
    lines = [line for line in capsys.readouterr().out.splitlines() if line and "---" not in line]
    assert len(lines) == 1 + 3 + 1 + 3  # two tables
    for line in lines:
        assert "Error" not in line, line
    assert lines[1].count("%") == 2 * 4
