LOSS = '''
import jax.numpy as jnp

from t5x_like.configurable import configurable
from t5x_like.learning.loss import Loss
from t5x_like.models.token_loss import Term


@configurable
class FocalLoss(Loss):
    """Cross-entropy that looks away from tokens that are easy (Lin et al. 2017).

    Attributes:
      gamma: how far.
    """

    gamma: float = 2.0

    def terms(self, model, output, batch, dropout_key):
        labels, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        likelihoods = model.head.log_likelihoods(output.x, model.embedding[...], labels)
        objective = jnp.sum(-weights * (1 - jnp.exp(likelihoods)) ** self.gamma * likelihoods)
        metrics = {"loss": jnp.sum(-weights * likelihoods), "focal": objective}
        return {"tokens": Term(objective, weights.sum(), metrics)}
'''


def test_a_loss(train):
    schedule = {"PipelineConfig.schedule": "'1f1b'", "RunConfig.gradient_accumulation": 2}
    records = train(LOSS, **{"RunConfig.loss": "@FocalLoss()", "FocalLoss.gamma": 1.0, **schedule})
    assert 0 < records[-1]["focal"] < records[0]["focal"] < records[0]["loss"]
