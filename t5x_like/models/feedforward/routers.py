"""Routers: softmax, sigmoid, expert choice, hashes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.dispatch import chosen_rows
from t5x_like.models.feedforward.dispatch import Experts
from t5x_like.models.feedforward.router import Router, RouterModule, Scores, TokenChoiceRouter
from t5x_like.models.parameters import Initializer
from t5x_like.sharding.experts import by_equal_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKRouter(TokenChoiceRouter):
    """A token goes to the experts of highest weight.

    Attributes:
      renormalize: the weights of a token's experts sum to 1, before `scaling`.
      use_bias: a bias on the logits.
      balance_bias: a bias that takes part in the choice alone, moved by `MoEConfig.bias_update_rate`.
      num_groups: equal groups of neighbouring experts, of which a token uses the best few (DeepSeek-V2, section 2.2.2).
      groups_per_token: how many of the groups.
      scaling: factor on the weights.
    """

    renormalize: bool = True
    use_bias: bool = False
    balance_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    scaling: float = 1.0

    # A group is as good as so many of its best experts together.
    best_of_group = 1

    def __post_init__(self):
        name = type(self).__name__
        if self.num_groups < 1:
            raise UserError(f"{name}.num_groups is {self.num_groups}: it must be at least 1.")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise UserError(
                f"{name}.groups_per_token is {self.groups_per_token}: it must be from 1 to num_groups "
                f"({self.num_groups})."
            )
        if self.scaling <= 0:
            raise UserError(f"{name}.scaling is {self.scaling}: it must be positive.")

    def check(self, num_experts: int, experts_per_token: int) -> None:
        """Refuses groups that do not divide the experts, or hold too few of them."""
        if self.num_groups == 1:
            return
        name, (size, rest) = type(self).__name__, divmod(num_experts, self.num_groups)
        if rest:
            raise UserError(
                f"{name}.num_groups ({self.num_groups}) does not divide MoEConfig.num_experts ({num_experts}): "
                "groups are equal in size."
            )
        if size < self.best_of_group:
            raise UserError(
                f"{name}.num_groups ({self.num_groups}) leaves one expert per group: a group is scored by its two "
                "best; use fewer groups."
            )
        if experts_per_token > size * self.groups_per_token:
            raise UserError(
                f"MoEConfig.experts_per_token is {experts_per_token}, but {name}.groups_per_token "
                f"({self.groups_per_token}) groups hold {size * self.groups_per_token} experts: raise groups_per_token."
            )

    def choose(self, logits, balance_bias, experts_per_token: int):
        weights = self.scores(logits).weights
        wanted = lax.stop_gradient(weights if balance_bias is None else weights + balance_bias)
        _, experts = lax.top_k(self._in_best_groups(wanted), experts_per_token)
        return experts, self.weigh(weights, logits, experts) * self.scaling

    def weigh(
        self,
        weights: Float[Array, "tokens experts"],
        logits: Float[Array, "tokens experts"],
        experts: Int[Array, "tokens choices"],
    ) -> Float[Array, "tokens choices"]:
        """The weights of the chosen experts, before `scaling`."""
        chosen = jnp.take_along_axis(weights, experts, axis=-1)
        if self.renormalize:
            chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
        return chosen

    def _in_best_groups(self, wanted: Float[Array, "tokens experts"]) -> Float[Array, "tokens experts"]:
        """-inf for the experts outside of a token's best groups."""
        if self.num_groups == 1:
            return wanted
        grouped = wanted.reshape(len(wanted), self.num_groups, -1)
        best = lax.top_k(grouped, self.best_of_group)[0].sum(axis=-1)
        _, groups = lax.top_k(best, self.groups_per_token)
        is_chosen = jnp.any(groups[..., None] == jnp.arange(self.num_groups), axis=1)
        return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(wanted.shape)


@configurable
class SoftmaxRouterConfig(TopKRouter):
    """A token goes to the experts of highest probability (Shazeer et al. 2017; Switch, Fedus et al. 2022).

    Renormalised as in Mixtral, in Qwen3-MoE with `norm_topk_prob`, and in gpt-oss, which takes the softmax after the
    choice: that is the same.
    """

    def scores(self, logits: Float[Array, "*batch experts"]) -> Scores:
        return softmax_scores(logits)

    def weigh(self, weights, logits, experts):
        if self.renormalize:
            return jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
        return super().weigh(weights, logits, experts)


@configurable
class SigmoidRouterConfig(TopKRouter):
    """A token goes to the experts of highest affinity, each a sigmoid of its own (DeepSeek-V3, section 2.1.2).

    Attributes:
      balance_bias: a bias that takes part in the choice alone, moved by `MoEConfig.bias_update_rate`.
    """

    balance_bias: bool = True

    best_of_group = 2

    def scores(self, logits: Float[Array, "*batch experts"]) -> Scores:
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        weights = jax.nn.sigmoid(logits)
        return Scores(weights, weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20), log_normalizer)


def softmax_scores(logits: Float[Array, "*batch experts"]) -> Scores:
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    return Scores(probabilities, probabilities, log_normalizer)


@configurable
class ExpertChoiceRouterConfig(Router):
    """Every expert takes the tokens of highest probability, equally many each (Zhou et al. 2022).

    `MoEConfig.experts_per_token` holds on average: a token may get more, or none. A choice looks at the tokens after
    it, so this does not suit causal models.

    Attributes:
      group_size: the experts choose among this many tokens at a time, see `CapacityConfig.group_size`.
    """

    group_size: int = 4096

    def __post_init__(self):
        if self.group_size < 1:
            raise UserError(f"ExpertChoiceRouterConfig.group_size is {self.group_size}: it must be at least 1.")

    def scores(self, logits: Float[Array, "*batch experts"]) -> Scores:
        return softmax_scores(logits)

    def mix(self, x, logits, is_token, experts: Experts):
        num_experts, group = experts.num_experts, experts.group
        capacity = min(max(round(group * experts.experts_per_token / num_experts), 1), group)
        weights = self.scores(logits).weights * is_token[:, None]
        rows, factors = chosen_rows(weights.reshape(-1, group, num_experts), capacity)
        y = by_equal_rows(x, rows, factors, experts.compute, num_experts, experts.shares)
        taken = jnp.zeros(len(x), bool).at[rows.token_of_row].set(True, mode="drop")
        assigned = jnp.sum(rows.token_of_row.reshape(num_experts, -1) < len(x), axis=1)
        sums = self.sums(logits, is_token, assigned, jnp.sum(is_token & ~taken))
        # What is dropped is tokens that no expert chose.
        return y, sums._replace(offered=sums.tokens)


@configurable
class HashRouterConfig(TokenChoiceRouter):
    """A token's experts follow from its number in the vocabulary and never change (Roller et al. 2021).

    Attributes:
      seed: which of the fixed random choices.
    """

    seed: int = 0

    reads_vectors = False

    def build(self, d_model: int, num_experts: int, *, init: Initializer, key: PRNGKeyArray) -> RouterModule:
        return HashRouter(num_experts, self.seed)

    def scores(self, logits: Float[Array, "*batch experts"]) -> Scores:
        certain = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
        return Scores(jnp.ones_like(logits), certain, jnp.zeros(logits.shape[:-1], logits.dtype))

    def choose(self, logits, balance_bias, experts_per_token: int):
        _, experts = lax.top_k(logits, experts_per_token)
        return experts, jnp.full(experts.shape, 1 / experts_per_token)


class HashRouter(RouterModule):
    def __init__(self, num_experts: int, seed: int):
        self.num_experts, self.seed = num_experts, seed

    def __call__(self, x, *, token_ids=None, jitter=0.0, key=None):
        """Random numbers, which depend on the token alone."""
        if token_ids is None:
            raise UserError("HashRouterConfig chooses by token, but this stack has none: use another router.")
        return hash_scores(token_ids, self.num_experts, self.seed)


def hash_scores(token_ids: Int[Array, "*batch"], num_experts: int, seed: int) -> Float[Array, "*batch experts"]:
    """A pseudo-random number in [0, 1) for each token of the vocabulary with each expert; its top k are k hashes."""
    pairs = token_ids[..., None].astype(jnp.uint32) * jnp.uint32(num_experts) + jnp.arange(
        num_experts, dtype=jnp.uint32
    )
    h = pairs ^ jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for multiplier, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):  # MurmurHash3's last steps
        h = (h ^ (h >> 16)) * jnp.uint32(multiplier)
        h = h ^ (h >> shift)
    return (h >> 8).astype(jnp.float32) / 2**24
