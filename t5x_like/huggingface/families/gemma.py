"""Gemma: zero-centred norms, scaled embeddings, GeGLU; 2 and 3 with norms on both sides and layers that alternate."""

import dataclasses
from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.layers import FULL, SLIDING, Layers, read_windows, with_windows, write_windows
from t5x_like.huggingface.families.llama import ATTENTION, ENDS, MLP, OURS, THEIRS, DecoderFamily
from t5x_like.huggingface.families.rotary import read_rotary, write_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.feedforward.mlp import Activation
from t5x_like.models.norms import NormConfig
from t5x_like.models.positions import RotaryConfig
from t5x_like.models.transformer import DecoderConfig

SANDWICH_RULES = (
    *ENDS,
    Rule(f"{OURS}/mixer_norm/scale", f"{THEIRS}.input_layernorm.weight"),
    Rule(f"{OURS}/mixer_out_norm/scale", f"{THEIRS}.post_attention_layernorm.weight"),
    Rule(f"{OURS}/feedforward_norm/scale", f"{THEIRS}.pre_feedforward_layernorm.weight"),
    Rule(f"{OURS}/feedforward_out_norm/scale", f"{THEIRS}.post_feedforward_layernorm.weight"),
    *ATTENTION,
    *MLP,
)


class Gemma(DecoderFamily):
    model_type, architecture = "gemma", "GemmaForCausalLM"
    tied = True

    def norm(self, fields: Fields) -> NormConfig:
        fields.expect("use_bidirectional_attention", False)
        return dataclasses.replace(super().norm(fields), zero_centered=True)

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"head_dim": fields.take("head_dim", 256), **self.biases(fields)}

    def activation(self, fields: Fields) -> Activation:
        fields.expect("hidden_activation", "gelu_pytorch_tanh")
        activation = fields.activation("hidden_act", "gelu_pytorch_tanh")
        # In Gemma's files "gelu" is a slip of the first release: the approximation is meant.
        return "gelu_tanh" if activation == "gelu" else activation

    def decoder(self, fields: Fields) -> dict[str, Any]:
        return {"scale_embedding": True}


def _read_cap(fields: Fields, name: str, default: float | None) -> float | None:
    cap = fields.take_nullable(name, default)
    return None if cap is None else float(cap)


class Gemma2(Gemma):
    model_type, architecture = "gemma2", "Gemma2ForCausalLM"
    rules = SANDWICH_RULES

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        # The size of heads, and what the products are divided by the root of, where that is another number.
        head_dim, scalar = fields.take("head_dim", 256), fields.take("query_pre_attn_scalar", 256)
        scale = None if scalar == head_dim else scalar**-0.5
        soft_cap = _read_cap(fields, "attn_logit_softcapping", 50.0)
        return {"head_dim": head_dim, "scale": scale, "soft_cap": soft_cap, **self.biases(fields)}

    def layers(self, fields: Fields) -> Layers:
        window = fields.take_nullable("sliding_window", 4096)
        return with_windows(read_windows(fields, lambda layer: layer % 2 == 0, window=window))

    def activation(self, fields: Fields) -> Activation:
        return fields.activation("hidden_activation", "gelu_pytorch_tanh")

    def block(self, fields: Fields) -> dict[str, Any]:
        return {"norm_place": "sandwich"}

    def head(self, fields: Fields) -> dict[str, Any]:
        return {"soft_cap": _read_cap(fields, "final_logit_softcapping", 30.0)}

    def write(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        fields, attention = super().write(config, max_length), config.stack.blocks[0].mixer
        fields["hidden_activation"] = fields.pop("hidden_act")
        scale = attention.scale or attention.head_size(config.d_model) ** -0.5
        return {
            **fields,
            "query_pre_attn_scalar": round(scale**-2),
            "final_logit_softcapping": config.head.soft_cap,
            **write_windows(config.stack.blocks),
            "attn_logit_softcapping": attention.soft_cap,
        }


class Gemma3(Gemma2):
    model_type, architecture = "gemma3_text", "Gemma3ForCausalLM"

    def rotary(self, fields: Fields) -> RotaryConfig:
        return read_rotary(fields, theta=1e6, layer_type=FULL)

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        fields.expect("attn_logit_softcapping", None)
        return {**super().heads(fields, norm), "soft_cap": None, "qk_norm": norm}

    def layers(self, fields: Fields) -> Layers:
        pattern = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
        window = fields.take_nullable("sliding_window", 4096)
        windows = read_windows(fields, lambda layer: (layer + 1) % pattern != 0, window=window)
        # Before transformers 5, the other fields were about the layers that see everything.
        local = RotaryConfig(theta=float(fields.take("rope_local_base_freq", 10_000.0)))
        if "rope_parameters" in fields.values:
            local = read_rotary(fields, theta=local.theta, layer_type=SLIDING)
        return with_windows(windows, rotary=local)

    def head(self, fields: Fields) -> dict[str, Any]:
        return {"soft_cap": _read_cap(fields, "final_logit_softcapping", None)}

    def write(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        fields = super().write(config, max_length)
        for name in ("rope_theta", "rope_scaling", "rope_parameters", "attn_logit_softcapping"):
            fields.pop(name, None)
        attentions = [block.mixer for block in config.stack.blocks]
        kinds = {SLIDING: [a for a in attentions if a.window], FULL: [a for a in attentions if not a.window]}
        rotary = {kind: (of_kind or attentions)[0].rotary for kind, of_kind in kinds.items()}
        return fields | {"rope_parameters": {kind: write_rotary(rotary[kind])["rope_parameters"] for kind in kinds}}


GEMMA, GEMMA2, GEMMA3 = Gemma(), Gemma2(), Gemma3()
