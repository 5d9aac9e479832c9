"""The feed-forward half of a block as a mixture of experts: every token sees a few of many small networks."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable, inert
from t5x_like.errors import UserError
from t5x_like.kernels.dispatch import capacity_rows, chosen_rows, of_tokens
from t5x_like.kernels.grouped_matmul import grouped_matmul
from t5x_like.models.feedforward.mlp import ACTIVATIONS, MLP, Activation, MLPConfig
from t5x_like.models.feedforward.routers import (
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    Router,
    RouterConfig,
    RouterStats,
    RouterSums,
    SoftmaxRouterConfig,
    check_choice,
    choose,
    scores,
    sums_over_tokens,
)
from t5x_like.models.parameters import Initializer, Initializers, Linear, Module, parameter
from t5x_like.sharding.experts import (
    Shares,
    by_equal_rows,
    by_gather,
    by_ragged_all_to_all,
    on_each_device,
    tokens_per_group,
)

Weights = dict[str, Float[Array, "..."]]
"""By the names of WEIGHT_AXES."""


@configurable
class DroplessConfig:
    """Every token reaches all of its experts, however many tokens an expert gets.

    Attributes:
      exchange: how tokens and experts meet where the mesh splits the experts. `gather`: every device sees all tokens of
        its `expert` axis; runs anywhere, and sends least when experts_per_token is near the axis' size or above.
        `ragged_all_to_all`: each copy of a token travels to its expert's device and back; for TPUs.
      buffer_factor: rows for a device's experts, as a multiple of their average number where the mesh splits the
        experts; None: as many as there could be. With a factor, assignments that find no row are dropped and counted.
      backend: the kernel of the grouped products; `auto`: the first that can do it (see docs/kernels.md).
    """

    exchange: Literal["gather", "ragged_all_to_all"] = "gather"
    buffer_factor: float | None = None
    backend: Literal["auto", "tpu", "triton", "reference", "chunked"] = "auto"

    def __post_init__(self):
        if self.buffer_factor is not None and self.buffer_factor < 1:
            raise UserError(
                f"DroplessConfig.buffer_factor is {self.buffer_factor}: below 1 tokens are dropped even when the "
                "experts are balanced; use 1.25 or more, or None."
            )


@configurable
class CapacityConfig:
    """An expert takes a fixed number of a group's tokens, the first that choose it; the others go without (T5X).

    The number is `capacity_factor * group size / num_experts`, so top-2 routing needs a factor above 2 to lose few.

    Attributes:
      capacity_factor: 1 for as many places as tokens.
      group_size: tokens at most that share an expert's places. Groups are whole sequences, or equal parts of one: the
        largest that the batch allows.
      min_capacity: places an expert has at least.
    """

    capacity_factor: float = 1.25
    group_size: int = 4096
    min_capacity: int = 4

    def __post_init__(self):
        if self.capacity_factor <= 0:
            raise UserError(f"CapacityConfig.capacity_factor is {self.capacity_factor}: it must be positive.")
        for name in ("group_size", "min_capacity"):
            if getattr(self, name) < 1:
                raise UserError(f"CapacityConfig.{name} is {getattr(self, name)}: it must be at least 1.")


@configurable
class MoEConfig:
    """Mixture of experts (Shazeer et al. 2017), each a two-layer perceptron.

    Attributes:
      num_experts: how many.
      experts_per_token: how many of them a token sees.
      d_ff: hidden size of an expert.
      activation: as in `MLPConfig`, or gpt-oss' `clamped_swiglu`, see `glu`.
      gated: multiplies the activated half by a second, linear projection.
      use_bias: biases on the experts' projections.
      router: how tokens and experts find each other.
      dispatch: whether an expert takes all of its tokens.
      shared_d_ff: hidden size of a perceptron that sees every token, beside the experts (DeepSeek's shared experts
        together); None: none.
      shared_gate: multiplies the shared perceptron's output by a sigmoid of the token (Qwen2-MoE).
      jitter: while training, the router sees the token times noise uniform in [1 - jitter, 1 + jitter] (Switch 2.2).
      load_balance_weight: of the load-balance loss in the objective (Switch uses 0.01).
      z_loss_weight: of the router's z-loss in the objective (ST-MoE uses 0.001).
      bias_update_rate: how far a step moves the router's balance bias, see `balanced`; 0 leaves it alone.
    """

    num_experts: int
    experts_per_token: int
    d_ff: int
    activation: Activation | Literal["clamped_swiglu"] = "silu"
    gated: bool = True
    use_bias: bool = False
    router: RouterConfig = SoftmaxRouterConfig()
    dispatch: DroplessConfig | CapacityConfig = inert(DroplessConfig())
    shared_d_ff: int | None = None
    shared_gate: bool = False
    jitter: float = inert(0.0)
    load_balance_weight: float = inert(0.0)
    z_loss_weight: float = inert(0.0)
    bias_update_rate: float = inert(0.0)

    def __post_init__(self):
        for name in ("num_experts", "experts_per_token", "d_ff", "shared_d_ff"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"MoEConfig.{name} is {value}: it must be at least 1.")
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"MoEConfig.experts_per_token is {self.experts_per_token}, but there are {self.num_experts} experts: "
                "lower it, or raise MoEConfig.num_experts."
            )
        for name in ("load_balance_weight", "z_loss_weight", "bias_update_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"MoEConfig.{name} is {getattr(self, name)}: it must not be negative.")
        check_choice(self.router, self.num_experts, self.experts_per_token)
        self._check_combinations()

    @property
    def shared(self) -> MLPConfig | None:
        """The perceptron that sees every token."""
        if self.shared_d_ff is None:
            return None
        return MLPConfig(d_ff=self.shared_d_ff, activation=self.activation, gated=self.gated, use_bias=self.use_bias)

    def _check_combinations(self):
        router = type(self.router).__name__
        if isinstance(self.router, ExpertChoiceRouterConfig) and self.dispatch != DroplessConfig():
            raise UserError(
                f"MoEConfig.dispatch is {self.dispatch} with ExpertChoiceRouterConfig: experts that choose take "
                "equally many tokens anyway; leave dispatch out, and set experts_per_token for how many."
            )
        if self.bias_update_rate and not getattr(self.router, "balance_bias", False):
            raise UserError(
                f"MoEConfig.bias_update_rate is {self.bias_update_rate}, but {router} has no balance bias: set "
                "balance_bias of SoftmaxRouterConfig or SigmoidRouterConfig."
            )
        if self.jitter and isinstance(self.router, HashRouterConfig):
            raise UserError("MoEConfig.jitter is set with HashRouterConfig, which looks at no values: use 0.")
        if not 0 <= self.jitter < 1:
            raise UserError(f"MoEConfig.jitter is {self.jitter}: it must be in [0, 1).")
        if self.shared_gate and self.shared_d_ff is None:
            raise UserError("MoEConfig.shared_gate is set without shared_d_ff: set the shared perceptron's size.")
        if self.activation == "clamped_swiglu" and (not self.gated or self.shared_d_ff):
            raise UserError(
                "MoEConfig.activation is 'clamped_swiglu': it needs gated=True, and no shared_d_ff, since MLPConfig "
                "does not have it."
            )


def glu(activation: str, gate: Float[Array, "*rows mlp"], up: Float[Array, "*rows mlp"]) -> Float[Array, "*rows mlp"]:
    """`activation(gate) * up`, or gpt-oss' clamped SwiGLU.

    The latter is `g * sigmoid(1.702 * g) * (u + 1)`, where g is the gate cut above 7, and u is `up` cut to [-7, 7].
    """
    if activation != "clamped_swiglu":
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


class ExpertLinear(Module):
    """One linear layer per expert: kernel [experts, in, out], bias [experts, out]."""

    def __init__(
        self,
        num_experts: int,
        in_dim: tuple[str, int],
        out_dim: tuple[str, int],
        *,
        init: Initializer,
        use_bias: bool,
        key: PRNGKeyArray,
    ):
        (in_name, fan_in), (out_name, fan_out) = in_dim, out_dim
        kernel = init(key, (num_experts, fan_in, fan_out), fan_in, fan_out)
        self.kernel = parameter(kernel, ("expert", in_name, out_name))
        self.bias = parameter(jnp.zeros((num_experts, fan_out)), ("expert", out_name)) if use_bias else None


WEIGHT_AXES = {
    "up": ("expert", "embed", "mlp"),
    "gate": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
    "up_bias": ("expert", "mlp"),
    "gate_bias": ("expert", "mlp"),
    "down_bias": ("expert", "embed"),
    "balance_bias": ("router",),
}
"""What a device needs to run experts on its tokens, apart from any dim of stacked layers."""


class MoE(Module):
    def __init__(
        self,
        config: MoEConfig,
        d_model: int,
        *,
        inits: Initializers,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        embed, mlp = ("embed", d_model), ("mlp", config.d_ff)
        keys = jax.random.split(key, 6)
        expert = partial(ExpertLinear, config.num_experts, use_bias=config.use_bias)
        self.router = Router(config.router, config.num_experts, d_model, init=inits.kernel, key=keys[0])
        self.up = expert(embed, mlp, init=inits.inner, key=keys[1])
        self.gate = expert(embed, mlp, init=inits.inner, key=keys[2]) if config.gated else None
        self.down = expert(mlp, embed, init=inits.out, key=keys[3])
        self.shared = MLP(config.shared, d_model, inits=inits, dtype=dtype, key=keys[4]) if config.shared else None
        gate = lambda: Linear(
            {"embed": d_model}, {"shared_gate": 1}, init=inits.kernel, use_bias=False, dtype=dtype, key=keys[5]
        )
        self.shared_gate = gate() if config.shared_gate else None
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        *,
        token_ids: Int[Array, "batch length"] | None = None,
        is_token: Bool[Array, "batch length"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch length embed"], RouterStats]:
        """The weighted sum of each token's experts, and of the shared perceptron.

        Args:
          x: the tokens.
          token_ids: their numbers in the vocabulary; a hash router needs them.
          is_token: False for padding: it takes no place at an expert and no part in the statistics; its output is 0.
          dropout_key: random key while training; without it there is no jitter.
        """
        logits = self.router(x, token_ids=token_ids, jitter=self.config.jitter, key=dropout_key)
        is_token = jnp.ones(x.shape[:2], bool) if is_token is None else is_token
        x = x.astype(self.dtype)
        size = getattr(self.config.router, "group_size", getattr(self.config.dispatch, "group_size", None))
        group = 1 if size is None else tokens_per_group(*x.shape[:2], size)
        weights = self._weights()
        y, sums = on_each_device(
            partial(mix, self.config, group=group),
            (x, logits, is_token),
            weights,
            {name: WEIGHT_AXES[name] for name in weights},
            group=group,
        )
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            y = y + jnp.where(is_token[..., None], shared, 0)
        return y, sums.means()

    def _weights(self) -> dict[str, Float[Array, "..."]]:
        """What the tokens' devices need: the experts' weights in the dtype of the computation, and the balance bias."""
        weights = {}
        for name, layer in {"up": self.up, "gate": self.gate, "down": self.down}.items():
            if layer is not None:
                weights[name] = layer.kernel[...].astype(self.dtype)
                if layer.bias is not None:
                    weights[f"{name}_bias"] = layer.bias[...].astype(self.dtype)
        if self.router.balance_bias is not None:
            weights["balance_bias"] = self.router.balance_bias[...]
        return weights


def mix(
    config: MoEConfig,
    x: Float[Array, "tokens embed"],
    logits: Float[Array, "tokens experts"],
    is_token: Bool[Array, "tokens"],
    weights: Weights,
    shares: Shares,
    *,
    group: int,
) -> tuple[Float[Array, "tokens embed"], RouterSums]:
    """Chooses experts for tokens, or tokens for experts, and adds up the experts' outputs: one device's part of it.

    Args:
      config: the mixture.
      x: this device's tokens.
      logits: the router's.
      is_token: False for padding.
      weights: of this device's experts.
      shares: how the mesh splits tokens and experts.
      group: that many neighbouring tokens share the places of an expert, or are chosen from together.
    """
    num_experts, choices = config.num_experts, config.experts_per_token
    compute = partial(run_experts, config.activation, weights)
    if isinstance(config.router, ExpertChoiceRouterConfig):
        y, assigned, dropped = _choose_tokens(config, x, logits, is_token, compute, shares, group)
        return y, sums_over_tokens(config.router, logits, is_token, assigned, dropped)

    experts, factors = choose(config.router, logits, weights.get("balance_bias"), choices)
    experts = jnp.where(is_token[:, None], experts, num_experts)
    if isinstance(config.dispatch, CapacityConfig):
        capacity = round(config.dispatch.capacity_factor * group / num_experts)
        capacity = min(max(capacity, config.dispatch.min_capacity), group)
        assignments, dropped = capacity_rows(experts.reshape(-1, group, choices), num_experts, capacity)
        rows, factors = of_tokens(assignments, factors)
        y = by_equal_rows(x, rows, factors, compute, num_experts, shares)
    else:
        exchange = by_gather if config.dispatch.exchange == "gather" else by_ragged_all_to_all
        # On the average device, experts get as many rows as its own tokens make.
        compute = partial(compute, backend=config.dispatch.backend, expected_rows=experts.size)
        y, dropped = exchange(x, experts, factors, compute, num_experts, shares, config.dispatch.buffer_factor)
    assigned = jnp.sum(experts[..., None] == jnp.arange(num_experts), axis=(0, 1))
    return y, sums_over_tokens(config.router, logits, is_token, assigned, dropped)


def _choose_tokens(config, x, logits, is_token, compute, shares, group):
    """Expert choice: returns the output, the tokens each expert took, and how many tokens no expert took."""
    capacity = min(max(round(group * config.experts_per_token / config.num_experts), 1), group)
    weights = scores(config.router, logits).weights * is_token[:, None]
    rows, factors = chosen_rows(weights.reshape(-1, group, config.num_experts), capacity)
    y = by_equal_rows(x, rows, factors, compute, config.num_experts, shares)
    taken = jnp.zeros(len(x), bool).at[rows.token_of_row].set(True, mode="drop")
    assigned = jnp.sum(rows.token_of_row.reshape(config.num_experts, -1) < len(x), axis=1)
    return y, assigned, jnp.sum(is_token & ~taken)


def run_experts(
    activation: str,
    weights: Weights,
    x: Float[Array, "*rows embed"],
    sizes: Int[Array, "experts"] | None,
    backend: str = "auto",
    expected_rows: int | None = None,
) -> Float[Array, "*rows embed"]:
    """All experts on their rows: [rows, embed] sorted by expert, or [experts, rows, embed] where `sizes` is None.

    `expected_rows` is that of `grouped_matmul`.
    """
    if sizes is None:
        multiply = lambda x, kernel: jnp.einsum("esd,edf->esf", x, kernel)
        pick = lambda bias: bias[:, None]
    else:
        multiply = lambda x, kernel: grouped_matmul(x, kernel, sizes, expected_rows=expected_rows, backend=backend)
        # A product with a one-hot matrix, since the gradient of a gather would be a scatter-add.
        expert = jnp.sum(jnp.arange(len(x))[:, None] >= jnp.cumsum(sizes), axis=1)
        one_hot = jax.nn.one_hot(expert, len(sizes), dtype=x.dtype)
        pick = lambda bias: one_hot @ bias

    def layer(x, name):
        y = multiply(x, weights[name])
        return y + pick(weights[f"{name}_bias"]) if f"{name}_bias" in weights else y

    up = checkpoint_name(layer(x, "up"), "mlp")
    if "gate" not in weights:
        return layer(ACTIVATIONS[activation](up), "down")
    return layer(glu(activation, checkpoint_name(layer(x, "gate"), "gate"), up), "down")
