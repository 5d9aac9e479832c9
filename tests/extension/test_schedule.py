import numpy as np

POLYNOMIAL = '''
import optax

from t5x_like.configurable import configurable
from t5x_like.training.schedules import Schedule


@configurable
class PolynomialSchedule(Schedule):
    """From the peak down to 0 at the end of the run.

    Attributes:
      power: of the way that is left.
    """

    power: float = 2.0

    def curve(self, num_steps):
        return optax.polynomial_schedule(self.learning_rate, 0.0, self.power, self.steps_after_warmup(num_steps))
'''


def test_a_schedule(train):
    settings = {"learning_rate": "%LEARNING_RATE", "warmup_steps": "%WARMUP_STEPS", "power": 3.0}
    flags = {f"PolynomialSchedule.{name}": value for name, value in settings.items()}
    records = train(POLYNOMIAL, **flags, **{"OptimizerConfig.schedule": "@PolynomialSchedule()"})
    expected = [0.01 / 3, 0.02 / 3, *(0.01 * (1 - step / 18) ** 3 for step in range(18))]
    np.testing.assert_allclose([record["learning_rate"] for record in records], expected, rtol=1e-5)
