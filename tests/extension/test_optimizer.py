SIGNUM = '''
import jax
import jax.numpy as jnp
import optax

from t5x_like.configurable import configurable
from t5x_like.training.optimizers import WeightDecay


@configurable
class SignumConfig(WeightDecay):
    """Signum (Bernstein et al. 2018): the sign of an average of gradients.

    Attributes:
      b1: decay of the average.
    """

    b1: float = 0.9

    def direction(self, layouts):
        sign = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
        return optax.chain(optax.trace(self.b1), sign)
'''


def test_an_optimizer(train, tmp_path):
    train(SIGNUM, **{"OptimizerConfig.algorithm": "@SignumConfig()", "SignumConfig.weight_decay": 0.01})
    assert "SignumConfig.weight_decay = 0.01" in (tmp_path / "run" / "operative_config.gin").read_text()
