"""Mixtures of experts in `config.json`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from t5x_like.huggingface.families.family import MIXED_DECODER, Fields, written_activation
from t5x_like.huggingface.families.layers import Layers
from t5x_like.huggingface.families.llama import OURS, THEIRS, DecoderFamily, mlp_rules
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.feedforward.routers import SoftmaxRouterConfig, TopKRouter
from t5x_like.models.transformer import DecoderConfig

EXPERTS = tuple(
    Rule(f"{OURS}/feedforward/{name}/kernel", f"{THEIRS}.mlp.experts.#.{name}_proj.weight", "linear")
    for name in ("gate", "up", "down")
)


def shared_rules(theirs: str) -> tuple[Rule, ...]:
    """Of a perceptron beside the experts."""
    return mlp_rules(f"{OURS}/feedforward/shared", f"{THEIRS}.mlp.{theirs}")


def read_mixture(fields: Fields, *, experts: str, d_ff: str, **mixture: Any) -> MoEConfig:
    """A mixture.

    Args:
      fields: of config.json.
      experts: the field for the number of experts.
      d_ff: the field for their hidden size.
      mixture: what the family adds to the fields that all have.
    """
    common = {
        "num_experts": fields.need(experts),
        "experts_per_token": fields.need("num_experts_per_tok"),
        "d_ff": fields.need(d_ff),
        "activation": mixture.pop("activation", None) or fields.activation("hidden_act", "silu"),
        "load_balance_weight": float(fields.take("router_aux_loss_coef", 0.0)),
    }
    if common["experts_per_token"] > common["num_experts"]:
        raise fields.unsupported("num_experts_per_tok", f"{experts} is {common['num_experts']}, which is less")
    return MoEConfig(**common, **mixture)


def write_mixture(mixture: MoEConfig, *, experts: str, d_ff: str) -> dict[str, Any]:
    """The fields that `read_mixture` reads."""
    return {
        experts: mixture.num_experts,
        "num_experts_per_tok": mixture.experts_per_token,
        d_ff: mixture.d_ff,
        "hidden_act": written_activation(mixture.activation),
        "router_aux_loss_coef": mixture.load_balance_weight,
    }


def with_mixtures(
    mixture: MoEConfig, sparse: Callable[[int], bool] = lambda layer: True, *, then: Layers | None = None
):
    """Layers with a mixture where `sparse` says so, changed by `then` as well."""

    def layers(layer: int, block: BlockConfig) -> BlockConfig:
        block = then(layer, block) if then else block
        return dataclasses.replace(block, feedforward=mixture) if sparse(layer) else block

    return layers


class MixtureFamily(DecoderFamily):
    """Decoders with a mixture of experts in some of their layers."""

    parts = MIXED_DECODER
    required = frozenset({MoEConfig})
    inert = frozenset({"output_router_logits"})


def sparse_layers(config: DecoderConfig) -> list[int]:
    """The numbers of the layers with a mixture."""
    return [i for i, block in enumerate(config.stack.blocks) if block.num_experts is not None]


def first_mixture(config: DecoderConfig) -> MoEConfig:
    """The mixture of the first layer that has one; there is one, or the family's `parts` would not fit."""
    return config.stack.blocks[sparse_layers(config)[0]].feedforward


def first_router(config: DecoderConfig) -> TopKRouter:
    """Its router. One of another kind cannot be written; what is read back will differ from it."""
    router = first_mixture(config).router
    return router if isinstance(router, TopKRouter) else SoftmaxRouterConfig()
