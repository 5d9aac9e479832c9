import dataclasses

import jax
import numpy as np

from t5x_like.configurable import REGISTRY
from t5x_like.inference.cache import attend_cached, empty_states
from tests import toy

MIXER = '''
import jax
import jax.numpy as jnp

from t5x_like.configurable import configurable
from t5x_like.models.mixers.mixer import Mixer
from t5x_like.models.parameters import Linear, Module


@configurable
class AverageConfig(Mixer):
    """The average of all tokens up to each, gated."""

    def build(self, spec, key):
        return Average(spec, key)

    def empty_state(self, batch, max_length, dtype, d_model):
        return jnp.zeros((batch, 1, d_model)), jnp.zeros((batch, 1, 1))

    def forward_flops(self, d_model, length, *, causal):
        return 4.0 * d_model


class Average(Module):
    def __init__(self, spec, key):
        embed, inner = {"embed": spec.d_model}, {"mlp": spec.d_model}
        layer = lambda i, j, k: Linear(i, j, init=spec.inits.kernel, use_bias=False, dtype=spec.dtype, key=k)
        value, gate, out = jax.random.split(key, 3)
        self.value, self.gate = layer(embed, inner, value), layer(embed, inner, gate)
        self.out = layer(inner, embed, out)

    def __call__(self, x, context, state=None):
        is_token = context.tokens.is_token
        weight = jnp.ones((*x.shape[:2], 1)) if is_token is None else is_token[..., None].astype(jnp.float32)
        total, count = (0.0, 0.0) if state is None else state
        total, count = total + jnp.cumsum(weight * self.value(x), axis=1), count + jnp.cumsum(weight, axis=1)
        y = self.out(jax.nn.sigmoid(self.gate(x)) * (total / jnp.maximum(count, 1)))
        return y, None if state is None else (total[:, -1:], count[:, -1:])
'''


def test_a_mixer(train, capsys):
    bindings = {"BlockConfig.mixer": "@AverageConfig()", "LoggingConfig.sample_tokens": 5}
    train(MIXER, **bindings)
    assert "Training complete at step 20." in capsys.readouterr().out
    reads_in_parts_what_it_reads_at_once(REGISTRY["AverageConfig"]())


def reads_in_parts_what_it_reads_at_once(mixer):
    stack = toy.model().stack
    stack = dataclasses.replace(stack, block=dataclasses.replace(stack.block, mixer=mixer))
    model = toy.model(vocab_size=toy.VOCAB, stack=stack).build(jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, toy.VOCAB, (2, 9))
    whole = model(toy.tokens(ids)).x
    states, parts = empty_states(model.config.stack, model.config.d_model, "float32", 2, 9), []
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        attend = attend_cached(np.int32(begin), np.zeros(2, np.int32), 9)
        out = model(toy.tokens(ids[:, begin:end]), attend=attend, states=states)
        parts, states = [*parts, out.x], out.states
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
