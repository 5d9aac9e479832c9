FEEDFORWARD = '''
import jax

from t5x_like.configurable import configurable
from t5x_like.models.feedforward.feedforward import FeedForward
from t5x_like.models.parameters import Linear, Module


@configurable
class BilinearConfig(FeedForward):
    """The product of two projections, projected back.

    Attributes:
      size: of the projections.
    """

    size: int

    def build(self, spec, key):
        return Bilinear(self.size, spec, key)


class Bilinear(Module):
    def __init__(self, size, spec, key):
        embed, inner, inits = {"embed": spec.d_model}, {"mlp": size}, spec.inits
        layer = lambda i, j, init, k: Linear(i, j, init=init, use_bias=False, dtype=spec.dtype, key=k)
        keys = jax.random.split(key, 3)
        self.left, self.right = (layer(embed, inner, inits.inner, k) for k in keys[:2])
        self.out = layer(inner, embed, inits.out, keys[2])

    def __call__(self, x, context):
        return self.out(self.left(x) * self.right(x)), None
'''


def test_a_feed_forward(train):
    train(
        FEEDFORWARD,
        **{"BlockConfig.feedforward": "@BilinearConfig()", "BilinearConfig.size": 32, "MLPConfig.d_ff": None},
    )
