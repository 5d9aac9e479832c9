"""Qwen 2, with biases on queries, keys and values, Qwen 3, with normalised queries and keys instead; their mixtures."""

from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.layers import Layers, read_windows, with_windows, write_windows
from t5x_like.huggingface.families.llama import OURS, RULES, THEIRS, DecoderFamily
from t5x_like.huggingface.families.mixture import (
    EXPERTS,
    MixtureFamily,
    first_mixture,
    first_router,
    read_mixture,
    shared_rules,
    sparse_layers,
    with_mixtures,
    write_mixture,
)
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.feedforward.routers import SoftmaxRouterConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.transformer import DecoderConfig

ROUTER = Rule(f"{OURS}/feedforward/router/kernel", f"{THEIRS}.mlp.gate.weight", "linear")
SHARED_GATE = Rule(f"{OURS}/feedforward/shared_gate/kernel", f"{THEIRS}.mlp.shared_expert_gate.weight", "linear")
MIXTURE_RULES = (ROUTER, *EXPERTS, SHARED_GATE, *shared_rules("shared_expert"), *RULES)


def _read_windows(fields: Fields, *, alternate: bool = False) -> list[int | None]:
    """Of the layers from `max_window_layers` on, or, in Qwen2-MoE, of every other one before it."""
    window = fields.take_nullable("sliding_window", 4096)
    used, limit = fields.take("use_sliding_window", False), fields.take("max_window_layers", 28)
    slides = (lambda layer: layer < limit and layer % 2 == 0) if alternate else (lambda layer: layer >= limit)
    used = used and window is not None
    return read_windows(fields, lambda layer: used and slides(layer), window=window if used else None)


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    fields = {"sliding_window": None, **write_windows(config.stack.blocks)}
    kinds = fields["layer_types"]
    # Told by layer_types and, where it can, by the older field too.
    first = next((layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"), len(kinds))
    return {"use_sliding_window": first < len(kinds), "max_window_layers": first, **fields}


def _read_mixture(fields: Fields, **mixture: Any) -> MoEConfig:
    router = SoftmaxRouterConfig(renormalize=fields.take("norm_topk_prob", False))
    # The name that transformers 5 gives it in Qwen 3's files.
    experts = "num_local_experts" if "num_local_experts" in fields.values else "num_experts"
    return read_mixture(fields, experts=experts, d_ff="moe_intermediate_size", router=router, **mixture)


def _is_sparse(fields: Fields):
    """Whether a layer has a mixture."""
    step, dense = fields.take("decoder_sparse_step", 1), fields.take("mlp_only_layers", [])
    return lambda layer: layer not in dense and (layer + 1) % step == 0


def _write_mixture(config: DecoderConfig) -> dict[str, Any]:
    sparse, mixture = sparse_layers(config), first_mixture(config)
    return {
        **write_mixture(mixture, experts="num_experts", d_ff="moe_intermediate_size"),
        "norm_topk_prob": first_router(config).renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(config.stack.num_layers) if layer not in sparse],
    }


class Qwen2(DecoderFamily):
    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    inert = frozenset({"use_mrope"})

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"use_qkv_bias": True}

    def layers(self, fields: Fields) -> Layers:
        return with_windows(_read_windows(fields))

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        return _write_windows(config)


class Qwen3(DecoderFamily):
    model_type, architecture = "qwen3", "Qwen3ForCausalLM"

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"head_dim": fields.take("head_dim", 128), "qk_norm": norm, **self.biases(fields)}

    def layers(self, fields: Fields) -> Layers:
        return with_windows(_read_windows(fields))

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        return {**_write_windows(config), **self.write_biases(config)}


class Qwen2Moe(MixtureFamily):
    model_type, architecture = "qwen2_moe", "Qwen2MoeForCausalLM"
    rules = MIXTURE_RULES

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"use_qkv_bias": fields.take("qkv_bias", True)}

    def layers(self, fields: Fields) -> Layers:
        shared = fields.take("shared_expert_intermediate_size", 5632)
        mixture = _read_mixture(fields, shared_d_ff=shared, shared_gate=True)
        windows = with_windows(_read_windows(fields, alternate=True))
        return with_mixtures(mixture, _is_sparse(fields), then=windows)

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        mixture = first_mixture(config)
        return {
            **_write_windows(config),
            **_write_mixture(config),
            "qkv_bias": config.stack.blocks[0].mixer.use_qkv_bias,
            "shared_expert_intermediate_size": mixture.shared_d_ff or mixture.d_ff,
        }


class Qwen3Moe(MixtureFamily):
    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    rules = MIXTURE_RULES
    inert = MixtureFamily.inert | {"max_window_layers"}

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"qk_norm": norm, **self.biases(fields)}

    def layers(self, fields: Fields) -> Layers:
        # All layers have the window, if there is one; here the field `max_window_layers` means nothing.
        window = fields.take_nullable("sliding_window", 4096)
        windows = [window if fields.take("use_sliding_window", False) else None] * fields.need("num_hidden_layers")
        return with_mixtures(_read_mixture(fields), _is_sparse(fields), then=with_windows(windows))

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        window = config.stack.blocks[0].mixer.window
        return {
            **self.write_biases(config),
            **_write_mixture(config),
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }


QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE = Qwen2(), Qwen3(), Qwen2Moe(), Qwen3Moe()
