"""An effect of a user's own: one plugin file, named by a flag."""

import pytest

from t5x_like.commands.main import main
from t5x_like.configurable import REGISTRY
from t5x_like.reporting.metrics import read_metrics
from tests import toy
from tests.commands.test_train import flags

PLUGIN = '''
"""Writes the loss of every fifth step to a file."""
from t5x_like.configurable import configurable
from t5x_like.training.effects import Effect, EffectConfig


@configurable
class LossFile(EffectConfig):
    """Writes losses.

    Attributes:
      every_steps: steps between losses.
    """

    every_steps: int = 5

    def build(self, run, step):
        return Writing(self.every_steps, run.directory.path / "losses.txt")


class Writing(Effect):
    def __init__(self, every_steps, path):
        self.every_steps, self.file = every_steps, path.open("a")

    def after_step(self, step, state, metrics):
        if step % self.every_steps == 0:
            print(step, float(metrics["loss"]), file=self.file)

    def end(self):
        self.file.close()
'''


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "tensor": 2, "fsdp": 2}, {"stage": 2, "data": 4}], ids=["tensor", "stage"]
)
def test_an_effect_from_a_plugin(tmp_path, monkeypatch, mesh):
    toy.write_text(tmp_path)
    name = f"loss_file_{'_'.join(mesh)}"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    axes = {f"MeshConfig.{axis}": size for axis, size in mesh.items()}
    changes = {"STEPS": 20, "BATCH_SIZE": 16, "LoggingConfig.every_steps": 5, "LoggingConfig.sample_tokens": 0}
    changes |= {"StackConfig.scan_layers": True, "PipelineConfig.num_microbatches": 2}
    given = flags(tmp_path, **changes, **axes, **{"RunConfig.effects": "(@LossFile(),)"})
    try:
        assert main(["train", f"--plugin={name}", *given]) == 0
    finally:
        REGISTRY.pop("LossFile", None)
    written = [line.split() for line in (tmp_path / "run" / "losses.txt").read_text().splitlines()]
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert [(int(step), float(loss)) for step, loss in written] == [(r["step"], r["loss"]) for r in records]
    assert len(written) == 4
