OBJECTIVE = '''
import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.objectives.causal import TOKENS, decoder_rows
from t5x_like.data.objectives.objective import Objective, token_features


@configurable
class SparseLM(Objective):
    """Some tokens are predicted, each from all before it.

    Attributes:
      stride: of so many tokens one is predicted.
    """

    stride: int

    def features(self, length, packed):
        return token_features(length, *TOKENS)

    def build(self, tokenizer, length, packed):
        predicted = np.arange(length) % self.stride == 0

        def transform(layout, index, keys):
            text = layout.read(index)
            rows = decoder_rows(text.pieces, text.before, text.tokens, length, packed, 0)
            return rows | {"decoder_loss_weights": rows["decoder_loss_weights"] * predicted}

        return transform
'''


def test_an_objective(train, capsys):
    train(OBJECTIVE, **{"DataConfig.objective": "@SparseLM()", "SparseLM.stride": 4})
    assert "8 x 16 decoder = 128 tokens per step: 128 of text, about 32 predicted (SparseLM" in capsys.readouterr().out
