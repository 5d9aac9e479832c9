ROUTER = '''
import jax
import jax.numpy as jnp
from jax import lax

from t5x_like.configurable import configurable
from t5x_like.models.feedforward.router import Scores, TokenChoiceRouter


@configurable
class SquareRouterConfig(TokenChoiceRouter):
    """A token goes to the experts whose logits are largest, weighted by the squares of these."""

    def scores(self, logits):
        squares = jnp.square(jax.nn.relu(logits)) + 1e-6
        total = squares.sum(axis=-1, keepdims=True)
        return Scores(squares, squares / total, jnp.log(total[..., 0]))

    def choose(self, logits, balance_bias, experts_per_token):
        weights, experts = lax.top_k(self.scores(logits).weights, experts_per_token)
        return experts, weights / weights.sum(axis=-1, keepdims=True)
'''


def test_a_router(train):
    mixture = {"num_experts": 4, "experts_per_token": 2, "d_ff": 16, "router": "@SquareRouterConfig()"}
    bindings = {"BlockConfig.feedforward": "@MoEConfig()", "MLPConfig.d_ff": None}
    records = train(ROUTER, **bindings, **{f"MoEConfig.{name}": value for name, value in mixture.items()})
    assert records[-1]["tokens_dropped"] == 0
    assert records[-1]["expert_load_max"] >= 1
