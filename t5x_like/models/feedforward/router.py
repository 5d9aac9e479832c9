"""The role of a router: which experts of a mixture see a token, and with what weight."""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t5x_like.kernels.randomness import uniform
from t5x_like.models.feedforward.dispatch import Experts
from t5x_like.models.feedforward.router_stats import RouterSums
from t5x_like.models.parameters import Initializer, Module, parameter
from t5x_like.sharding.logical import constrain


class Scores(NamedTuple):
    """What a router thinks of every token and expert, in float32.

    Attributes:
      weights: by which an expert's output would be multiplied, before renormalisation and scaling.
      probabilities: sum to 1 over the experts of a token; for the balance loss and the entropy.
      log_normalizer: logarithm of the sum of the exponentials of a token's logits; 0 for a router without logits.
    """

    weights: Float[Array, "*batch experts"]
    probabilities: Float[Array, "*batch experts"]
    log_normalizer: Float[Array, "*batch"]


class RouterModule(Module):
    """Logits of every token and expert. The experts' dim is named `router`: no rule splits it, since a choice compares
    all experts.

    Attributes:
      balance_bias: takes part in the choice alone; None: there is none.
    """

    balance_bias = None

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        token_ids: Int[Array, "batch length"] | None = None,
        jitter: float = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch length experts"]:
        """Logits in float32, whatever the dtype of x (Switch, section 2.4).

        Without a key there is no jitter: the factors on x, uniform in [1 - jitter, 1 + jitter].
        """
        raise NotImplementedError


class LinearRouter(RouterModule):
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        init: Initializer,
        use_bias: bool,
        balance_bias: bool,
        key: PRNGKeyArray,
    ):
        self.kernel = parameter(init(key, (d_model, num_experts), d_model, num_experts), ("embed", "router"))
        zeros: Float[Array, "experts"] = jnp.zeros(num_experts)
        self.bias = parameter(zeros, ("router",)) if use_bias else None
        self.balance_bias = parameter(zeros, ("router",)) if balance_bias else None

    def __call__(self, x, *, token_ids=None, jitter=0.0, key=None):
        x = x.astype(jnp.float32)
        if key is not None and jitter > 0:
            x = x * uniform(key, x.shape, 1 - jitter, 1 + jitter)
        # Whole, and whole again: left to itself XLA passes parts of this small product across the mesh, for which
        # devices of one stage of a pipeline would wait for those of another.
        kernel = constrain(self.kernel[...], None, None)
        logits = jnp.einsum("btd,de->bte", x, kernel, precision=lax.Precision.HIGHEST)
        logits = constrain(logits, "batch", "length", None)
        return logits if self.bias is None else logits + self.bias[...]


class Router(abc.ABC):
    """The role of a router.

    Attributes:
      use_bias: whether its logits have a bias.
      balance_bias: whether a bias takes part in the choice alone, which `MoEConfig.bias_update_rate` moves.
      group_size: tokens at most that experts choose from together; None: tokens choose, each by itself.
      reads_vectors: whether the choice depends on a token's vector, so that jitter has a meaning.
    """

    use_bias: bool = False
    balance_bias: bool = False
    group_size: int | None = None
    reads_vectors: bool = True

    def build(self, d_model: int, num_experts: int, *, init: Initializer, key: PRNGKeyArray) -> RouterModule:
        """The layer that makes logits of vectors."""
        biases = {"use_bias": self.use_bias, "balance_bias": self.balance_bias}
        return LinearRouter(d_model, num_experts, init=init, key=key, **biases)

    @abc.abstractmethod
    def scores(self, logits: Float[Array, "*batch experts"]) -> Scores:
        """Weights and probabilities from logits."""

    @abc.abstractmethod
    def mix(
        self,
        x: Float[Array, "tokens embed"],
        logits: Float[Array, "tokens experts"],
        is_token: Bool[Array, "tokens"],
        experts: Experts,
    ) -> tuple[Float[Array, "tokens embed"], RouterSums]:
        """Chooses experts for tokens, or tokens for experts, and adds up what the experts make of them.

        One device's part of it: `x` are its tokens, `is_token` is False for padding.
        """

    def check(self, num_experts: int, experts_per_token: int) -> None:  # noqa: B027
        """Refuses numbers of experts between which it cannot choose."""

    def sums(
        self,
        logits: Float[Array, "tokens experts"],
        is_token: Bool[Array, "tokens"],
        assigned: Int[Array, "experts"],
        dropped: Int[Array, ""],
    ) -> RouterSums:
        """One device's share of the statistics; only the probabilities and log-normalizers have a gradient."""
        _, probabilities, log_normalizer = self.scores(logits)
        entropy = jnp.sum(jax.scipy.special.entr(lax.stop_gradient(probabilities)), axis=-1)
        of_tokens = lambda values: jnp.sum(jnp.where(is_token, values, 0))
        tokens = of_tokens(1.0)
        return RouterSums(
            tokens=tokens,
            probabilities=jnp.sum(jnp.where(is_token[:, None], probabilities, 0), axis=0),
            squared_log_normalizers=of_tokens(jnp.square(log_normalizer)),
            entropies=of_tokens(entropy),
            assigned=assigned.astype(jnp.float32),
            dropped=dropped.astype(jnp.float32),
            offered=jnp.sum(assigned).astype(jnp.float32),
        )


class TokenChoiceRouter(Router):
    """A router by which each token chooses its experts."""

    @abc.abstractmethod
    def choose(
        self,
        logits: Float[Array, "tokens experts"],
        balance_bias: Float[Array, "experts"] | None,
        experts_per_token: int,
    ) -> tuple[Int[Array, "tokens choices"], Float[Array, "tokens choices"]]:
        """The experts of each token, best first (of equals the first in number), and their weights."""

    def mix(self, x, logits, is_token, experts: Experts):
        chosen, factors = self.choose(logits, experts.balance_bias, experts.experts_per_token)
        chosen = jnp.where(is_token[:, None], chosen, experts.num_experts)
        y, dropped = experts.dispatch.send(x, chosen, factors, experts)
        assigned = jnp.sum(chosen[..., None] == jnp.arange(experts.num_experts), axis=(0, 1))
        return y, self.sums(logits, is_token, assigned, dropped)
