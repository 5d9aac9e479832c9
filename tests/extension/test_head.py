HEAD = '''
from t5x_like.configurable import configurable
from t5x_like.data.objectives.causal import CausalLM
from t5x_like.models.heads.head import Head, HeadModule, classification


@configurable
class OddNext(CausalLM):
    """Whether the number of the next token is odd."""

    def features(self, length, packed):
        features = super().features(length, packed)
        return {name.replace("target_tokens", "odd"): feature for name, feature in features.items()}

    def build(self, tokenizer, length, packed):
        make = super().build(tokenizer, length, packed)
        odd = lambda rows: {"decoder_odd": rows.pop("decoder_target_tokens") % 2}
        return lambda layout, index, keys: (lambda rows: odd(rows) | rows)(make(layout, index, keys))


@configurable
class OddHeadConfig(Head):
    @classmethod
    def target(cls, side):
        return f"{side}_odd"

    def weights(self, batch, side):
        return {"tokens": batch["decoder_loss_weights"]}

    def build(self, spec, key):
        return OddHead(spec, key)


class OddHead(HeadModule):
    def __init__(self, spec, key):
        self.out = spec.linear({"classes": 2}, True, key)

    def terms(self, x, batch, **options):
        return {"tokens": classification("", self.out(x), batch["decoder_odd"], batch["decoder_loss_weights"])}
'''


def test_a_head_and_its_objective(train):
    records = train(HEAD, **{"DataConfig.objective": "@OddNext()", "DecoderConfig.head": "@OddHeadConfig()"})
    assert records[0]["loss"] < 1  # of two classes
    assert records[-1]["accuracy"] > 0.5
