"""An effect of a user's own: one plugin file, named by a flag."""

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


def test_an_effect_from_a_plugin(train, tmp_path):
    records = train(PLUGIN, **{"RunConfig.effects": "(@LossFile(),)"})
    written = [line.split() for line in (tmp_path / "run" / "losses.txt").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in written] == [(r["step"], r["loss"]) for r in records[4::5]]
    assert len(written) == 4
