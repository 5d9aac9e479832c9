"""Routers: which experts of a mixture see a token, and with what weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.kernels.randomness import uniform
from t5x_like.models.parameters import Initializer, Module, parameter
from t5x_like.sharding.logical import constrain


@configurable
class SoftmaxRouterConfig:
    """A token goes to the experts of highest probability (Shazeer et al. 2017; Switch, Fedus et al. 2022).

    Attributes:
      renormalize: the weights of a token's experts sum to 1, as in Mixtral, in Qwen3-MoE with `norm_topk_prob`, and in
        gpt-oss, which takes the softmax after the choice: that is the same.
      use_bias: a bias on the logits (gpt-oss).
      balance_bias: a bias that takes part in the choice alone, moved by `MoEConfig.bias_update_rate`.
      num_groups: equal groups of neighbouring experts, of which a token uses the best few (DeepSeek-V2, section 2.2.2).
      groups_per_token: how many of the groups; a group is as good as its best expert.
      scaling: factor on the weights.
    """

    renormalize: bool = True
    use_bias: bool = False
    balance_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    scaling: float = 1.0

    def __post_init__(self):
        _check_groups(self)


@configurable
class SigmoidRouterConfig:
    """A token goes to the experts of highest affinity, each a sigmoid of its own (DeepSeek-V3, section 2.1.2).

    Attributes:
      renormalize: the weights of a token's experts sum to 1, before `scaling`.
      use_bias: a bias on the logits.
      balance_bias: a bias that takes part in the choice alone, moved by `MoEConfig.bias_update_rate`.
      num_groups: equal groups of neighbouring experts, of which a token uses the best few.
      groups_per_token: how many of the groups; a group is as good as its two best experts together.
      scaling: factor on the weights.
    """

    renormalize: bool = True
    use_bias: bool = False
    balance_bias: bool = True
    num_groups: int = 1
    groups_per_token: int = 1
    scaling: float = 1.0

    def __post_init__(self):
        _check_groups(self)


@configurable
class ExpertChoiceRouterConfig:
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


@configurable
class HashRouterConfig:
    """A token's experts follow from its number in the vocabulary and never change (Roller et al. 2021).

    Attributes:
      seed: which of the fixed random choices.
    """

    seed: int = 0


RouterConfig = SoftmaxRouterConfig | SigmoidRouterConfig | ExpertChoiceRouterConfig | HashRouterConfig


def _check_groups(config: SoftmaxRouterConfig | SigmoidRouterConfig) -> None:
    name = type(config).__name__
    if config.num_groups < 1:
        raise UserError(f"{name}.num_groups is {config.num_groups}: it must be at least 1.")
    if not 1 <= config.groups_per_token <= config.num_groups:
        raise UserError(
            f"{name}.groups_per_token is {config.groups_per_token}: it must be from 1 to num_groups "
            f"({config.num_groups})."
        )
    if config.scaling <= 0:
        raise UserError(f"{name}.scaling is {config.scaling}: it must be positive.")


def check_choice(config: RouterConfig, num_experts: int, experts_per_token: int) -> None:
    """Refuses groups that do not divide the experts, or hold too few of them."""
    if not isinstance(config, SoftmaxRouterConfig | SigmoidRouterConfig) or config.num_groups == 1:
        return
    name, (size, rest) = type(config).__name__, divmod(num_experts, config.num_groups)
    if rest:
        raise UserError(
            f"{name}.num_groups ({config.num_groups}) does not divide MoEConfig.num_experts ({num_experts}): "
            "groups are equal in size."
        )
    if isinstance(config, SigmoidRouterConfig) and size < 2:
        raise UserError(
            f"{name}.num_groups ({config.num_groups}) leaves one expert per group: a group is scored by its two best; "
            "use fewer groups."
        )
    if experts_per_token > size * config.groups_per_token:
        raise UserError(
            f"MoEConfig.experts_per_token is {experts_per_token}, but {name}.groups_per_token "
            f"({config.groups_per_token}) groups hold {size * config.groups_per_token} experts: raise groups_per_token."
        )


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


class Router(Module):
    """The experts' dim is named `router`: no rule splits it, since a choice compares all experts."""

    def __init__(self, config: RouterConfig, num_experts: int, d_model: int, *, init: Initializer, key: PRNGKeyArray):
        is_hash = isinstance(config, HashRouterConfig)
        kernel = None if is_hash else init(key, (d_model, num_experts), d_model, num_experts)
        self.kernel = None if kernel is None else parameter(kernel, ("embed", "router"))
        zeros: Float[Array, "experts"] = jnp.zeros(num_experts)
        self.bias = parameter(zeros, ("router",)) if getattr(config, "use_bias", False) else None
        self.balance_bias = parameter(zeros, ("router",)) if getattr(config, "balance_bias", False) else None
        self.config = config
        self.num_experts = num_experts

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        token_ids: Int[Array, "batch length"] | None = None,
        jitter: float = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch length experts"]:
        """Logits in float32, whatever the dtype of x (Switch, section 2.4); of a hash router, random numbers.

        Without a key there is no jitter: the factors on x, uniform in [1 - jitter, 1 + jitter].
        """
        if isinstance(self.config, HashRouterConfig):
            if token_ids is None:
                raise UserError("HashRouterConfig chooses by token, but this stack has none: use another router.")
            return hash_scores(token_ids, self.num_experts, self.config.seed)
        x = x.astype(jnp.float32)
        if key is not None and jitter > 0:
            x = x * uniform(key, x.shape, 1 - jitter, 1 + jitter)
        # Whole, and whole again: left to itself XLA passes parts of this small product across the mesh, for which
        # devices of one stage of a pipeline would wait for those of another.
        kernel = constrain(self.kernel[...], None, None)
        logits = jnp.einsum("btd,de->bte", x, kernel, precision=lax.Precision.HIGHEST)
        logits = constrain(logits, "batch", "length", None)
        return logits if self.bias is None else logits + self.bias[...]


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


def scores(config: RouterConfig, logits: Float[Array, "*batch experts"]) -> Scores:
    """Weights and probabilities from logits."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    match config:
        case HashRouterConfig():
            certain = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
            return Scores(jnp.ones_like(logits), certain, jnp.zeros_like(log_normalizer))
        case SigmoidRouterConfig():
            weights = jax.nn.sigmoid(logits)
            return Scores(weights, weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20), log_normalizer)
    probabilities = jax.nn.softmax(logits, axis=-1)
    return Scores(probabilities, probabilities, log_normalizer)


def choose(
    config: SoftmaxRouterConfig | SigmoidRouterConfig | HashRouterConfig,
    logits: Float[Array, "tokens experts"],
    balance_bias: Float[Array, "experts"] | None,
    experts_per_token: int,
) -> tuple[Int[Array, "tokens choices"], Float[Array, "tokens choices"]]:
    """The experts of each token, best first (of equals the first in number), and their weights."""
    if isinstance(config, HashRouterConfig):
        _, experts = lax.top_k(logits, experts_per_token)
        return experts, jnp.full(experts.shape, 1 / experts_per_token)
    weights = scores(config, logits).weights
    wanted = lax.stop_gradient(weights if balance_bias is None else weights + balance_bias)
    _, experts = lax.top_k(_in_best_groups(config, wanted), experts_per_token)
    if config.renormalize and isinstance(config, SoftmaxRouterConfig):
        chosen = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
    else:
        chosen = jnp.take_along_axis(weights, experts, axis=-1)
        if config.renormalize:
            chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
    return experts, chosen * config.scaling


def _in_best_groups(
    config: SoftmaxRouterConfig | SigmoidRouterConfig, wanted: Float[Array, "tokens experts"]
) -> Float[Array, "tokens experts"]:
    """-inf for the experts outside of a token's best groups."""
    if config.num_groups == 1:
        return wanted
    grouped = wanted.reshape(len(wanted), config.num_groups, -1)
    best = lax.top_k(grouped, 2 if isinstance(config, SigmoidRouterConfig) else 1)[0].sum(axis=-1)
    _, groups = lax.top_k(best, config.groups_per_token)
    is_chosen = jnp.any(groups[..., None] == jnp.arange(config.num_groups), axis=1)
    return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(wanted.shape)


class RouterStats(NamedTuple):
    """What a router did, in float32, over the real tokens of a whole call, however the mesh splits them.

    Attributes:
      load_balance: Switch's loss (section 2.2): num_experts * sum over experts of the share of tokens that chose it
        times its mean probability; experts_per_token when balanced.
      z_loss: mean of the squared logarithm of the sum of the exponentials of the logits (ST-MoE, section 3.1).
      entropy: mean entropy of a token's probabilities, in nats.
      dropped: share of the assignments to experts that found no place; of a router of expert choice, the share of the
        tokens that no expert chose.
      load: each expert's share of all assignments, dropped ones too.
    """

    load_balance: Float[Array, ""]
    z_loss: Float[Array, ""]
    entropy: Float[Array, ""]
    dropped: Float[Array, ""]
    load: Float[Array, "experts"]


class RouterSums(NamedTuple):
    """Over tokens; `offered` is what `dropped` is a share of, and the others as in `RouterStats`."""

    tokens: Float[Array, ""]
    probabilities: Float[Array, "experts"]
    squared_log_normalizers: Float[Array, ""]
    entropies: Float[Array, ""]
    assigned: Float[Array, "experts"]
    dropped: Float[Array, ""]
    offered: Float[Array, ""]

    def means(self) -> RouterStats:
        tokens = jnp.maximum(self.tokens, 1)
        balance = jnp.sum(self.assigned / tokens * self.probabilities / tokens) * len(self.assigned)
        return RouterStats(
            load_balance=balance,
            z_loss=self.squared_log_normalizers / tokens,
            entropy=self.entropies / tokens,
            dropped=self.dropped / jnp.maximum(self.offered, 1),
            load=self.assigned / jnp.maximum(jnp.sum(self.assigned), 1),
        )


def sums_over_tokens(
    config: RouterConfig,
    logits: Float[Array, "tokens experts"],
    is_token: Bool[Array, "tokens"],
    assigned: Int[Array, "experts"],
    dropped: Int[Array, ""],
) -> RouterSums:
    """One device's share of the statistics; only the probabilities and log-normalizers have a gradient."""
    _, probabilities, log_normalizer = scores(config, logits)
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
        offered=tokens if isinstance(config, ExpertChoiceRouterConfig) else jnp.sum(assigned).astype(jnp.float32),
    )


def balanced(
    bias: Float[Array, "*layers experts"], load: Float[Array, "*layers experts"], rate: float
) -> Float[Array, "*layers experts"]:
    """The balance bias after a step: up for experts with less than their share, down for others.

    Balancing without a loss (Wang et al. 2024, algorithm 1): `bias + rate * sign(mean load - load)`.

    Args:
      bias: `router.balance_bias` of one layer, or of several on leading dims.
      load: `RouterStats.load` of the step's whole batch.
      rate: how far a bias moves; DeepSeek-V3 uses 0.001.
    """
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
