"""The feed-forward half of a block as a mixture of experts: every token sees a few of many small networks."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t5x_like.configurable import configurable, inert
from t5x_like.errors import UserError
from t5x_like.kernels.grouped_matmul import grouped_matmul
from t5x_like.models.context import Context
from t5x_like.models.feedforward.dispatch import Dispatch, DroplessConfig, Experts
from t5x_like.models.feedforward.feedforward import FeedForward
from t5x_like.models.feedforward.mlp import ACTIVATIONS, Activation, MLPConfig
from t5x_like.models.feedforward.router import Router
from t5x_like.models.feedforward.router_stats import RouterStats, RouterSums
from t5x_like.models.feedforward.routers import SoftmaxRouterConfig
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.parameters import Initializer, Linear, Module, Params, parameter
from t5x_like.sharding.experts import Shares, on_each_device, tokens_per_group

Weights = dict[str, Float[Array, "..."]]
"""By the names of WEIGHT_AXES."""


@configurable
class MoEConfig(FeedForward):
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
    router: Router = SoftmaxRouterConfig()
    dispatch: Dispatch = inert(DroplessConfig())
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
        self.router.check(self.num_experts, self.experts_per_token)
        self._check_combinations()

    @property
    def shared(self) -> MLPConfig | None:
        """The perceptron that sees every token."""
        if self.shared_d_ff is None:
            return None
        return MLPConfig(d_ff=self.shared_d_ff, activation=self.activation, gated=self.gated, use_bias=self.use_bias)

    @property
    def uses_dropout(self) -> bool:
        return self.jitter > 0

    @property
    def depends_on_place(self) -> bool:
        # Random numbers go by place; so does what experts choose from together.
        return self.dispatch.depends_on_place or self.router.group_size is not None or self.jitter > 0

    def build(self, spec: LayerSpec, key: PRNGKeyArray) -> "MoE":
        return MoE(self, spec, key)

    def share_used(self, path: Sequence[str]) -> float:
        return self.experts_per_token / self.num_experts if path[0] in ("up", "gate", "down") else 1.0

    def router_loss(self, stats: RouterStats) -> Float[Array, "*layers"]:
        return self.load_balance_weight * stats.load_balance + self.z_loss_weight * stats.z_loss

    def balanced(self, params: Params, stats: RouterStats) -> Params:
        if not self.bias_update_rate:
            return params
        router = params["router"]
        bias = balanced(router["balance_bias"], stats.load, self.bias_update_rate)
        return {**params, "router": {**router, "balance_bias": bias}}

    def _check_combinations(self):
        router = type(self.router).__name__
        if self.router.group_size is not None and self.dispatch != DroplessConfig():
            raise UserError(
                f"MoEConfig.dispatch is {self.dispatch} with {router}: experts that choose take "
                "equally many tokens anyway; leave dispatch out, and set experts_per_token for how many."
            )
        if self.bias_update_rate and not self.router.balance_bias:
            raise UserError(
                f"MoEConfig.bias_update_rate is {self.bias_update_rate}, but {router} has no balance bias: set "
                "balance_bias of SoftmaxRouterConfig or SigmoidRouterConfig."
            )
        if self.jitter and not self.router.reads_vectors:
            raise UserError(f"MoEConfig.jitter is set with {router}, which looks at no values: use 0.")
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
    def __init__(self, config: MoEConfig, spec: LayerSpec, key: PRNGKeyArray):
        d_model, inits = spec.d_model, spec.inits
        embed, mlp = ("embed", d_model), ("mlp", config.d_ff)
        keys = jax.random.split(key, 6)
        expert = partial(ExpertLinear, config.num_experts, use_bias=config.use_bias)
        self.router = config.router.build(d_model, config.num_experts, init=inits.kernel, key=keys[0])
        self.up = expert(embed, mlp, init=inits.inner, key=keys[1])
        self.gate = expert(embed, mlp, init=inits.inner, key=keys[2]) if config.gated else None
        self.down = expert(mlp, embed, init=inits.out, key=keys[3])
        self.shared = config.shared.build(spec, keys[4]) if config.shared else None
        gate = lambda: Linear(
            {"embed": d_model}, {"shared_gate": 1}, init=inits.kernel, use_bias=False, dtype=spec.dtype, key=keys[5]
        )
        self.shared_gate = gate() if config.shared_gate else None
        self.config = config
        self.dtype = spec.dtype

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        context: Context,
    ) -> tuple[Float[Array, "batch length embed"], RouterStats]:
        """The weighted sum of each token's experts, and of the shared perceptron.

        Padding takes no place at an expert and no part in the statistics; its output is 0.
        """
        config, tokens = self.config, context.tokens
        logits = self.router(x, token_ids=tokens.ids, jitter=config.jitter, key=context.dropout_key)
        is_token = jnp.ones(x.shape[:2], bool) if tokens.is_token is None else tokens.is_token
        x = x.astype(self.dtype)
        size = config.router.group_size or config.dispatch.group_size
        group = 1 if size is None else tokens_per_group(*x.shape[:2], size)
        weights = self._weights()
        y, sums = on_each_device(
            partial(mix, config, group=group),
            (x, logits, is_token),
            weights,
            {name: WEIGHT_AXES[name] for name in weights},
            group=group,
        )
        if self.shared is not None:
            shared, _ = self.shared(x, context)
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
    """One device's part of the mixture; `group` is as in `Experts`."""
    experts = Experts(
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        compute=partial(run_experts, config.activation, weights),
        dispatch=config.dispatch,
        shares=shares,
        group=group,
        balance_bias=weights.get("balance_bias"),
    )
    return config.router.mix(x, logits, is_token, experts)


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
