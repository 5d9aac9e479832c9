"""Gemma: zero-centred norms, scaled embeddings, GeGLU; 2 and 3 with norms on both sides and layers that alternate."""

import dataclasses
from typing import Any

from t5x_like.huggingface.families.family import Family, Fields
from t5x_like.huggingface.families.layers import FULL, SLIDING, Layers, read_windows, with_windows, write_windows
from t5x_like.huggingface.families.llama import (
    ATTENTION,
    ENDS,
    MLP,
    OURS,
    RULES,
    THEIRS,
    read_attention,
    read_biases,
    read_decoder,
    read_norm,
    write_attention,
    write_biases,
    write_decoder,
)
from t5x_like.huggingface.families.rotary import read_rotary, write_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.mixers.attention import AttentionConfig
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


def _read_norm(fields: Fields) -> NormConfig:
    return dataclasses.replace(read_norm(fields), zero_centered=True)


def _read(fields: Fields) -> DecoderConfig:
    fields.expect("use_bidirectional_attention", False)
    fields.expect("hidden_activation", "gelu_pytorch_tanh")
    activation = fields.activation("hidden_act", "gelu_pytorch_tanh")
    return read_decoder(
        fields,
        norm=_read_norm(fields),
        attention=read_attention(fields, head_dim=fields.take("head_dim", 256), **read_biases(fields)),
        # In Gemma's files "gelu" is a slip of the first release: the approximation is meant.
        activation="gelu_tanh" if activation == "gelu" else activation,
        tied=True,
        scale_embedding=True,
    )


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    return {**write_decoder(config, max_length), **write_attention(config), **write_biases(config)}


def _read_scale(fields: Fields) -> dict[str, Any]:
    """The size of heads, and what the products are divided by the root of, where that is another number."""
    head_dim, scalar = fields.take("head_dim", 256), fields.take("query_pre_attn_scalar", 256)
    return {"head_dim": head_dim, "scale": None if scalar == head_dim else scalar**-0.5}


def _write_sandwich(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    fields, attention = _write(config, max_length), config.stack.blocks[0].mixer
    fields["hidden_activation"] = fields.pop("hidden_act")
    scale = attention.scale or attention.head_size(config.d_model) ** -0.5
    return {
        **fields,
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": config.head.soft_cap,
        **write_windows(config.stack.blocks),
    }


def _read_cap(fields: Fields, name: str, default: float | None) -> float | None:
    cap = fields.take_nullable(name, default)
    return None if cap is None else float(cap)


def _read2(fields: Fields) -> DecoderConfig:
    fields.expect("use_bidirectional_attention", False)
    windows = read_windows(fields, lambda layer: layer % 2 == 0, window=fields.take_nullable("sliding_window", 4096))
    soft_cap = _read_cap(fields, "attn_logit_softcapping", 50.0)
    attention = read_attention(fields, soft_cap=soft_cap, **_read_scale(fields), **read_biases(fields))
    return _read_sandwich(fields, attention, with_windows(windows), _read_cap(fields, "final_logit_softcapping", 30.0))


def _read_sandwich(fields: Fields, attention: AttentionConfig, layers: Layers, soft_cap: float | None) -> DecoderConfig:
    return read_decoder(
        fields,
        norm=_read_norm(fields),
        attention=attention,
        layers=layers,
        activation=fields.activation("hidden_activation", "gelu_pytorch_tanh"),
        block={"norm_place": "sandwich"},
        head={"soft_cap": soft_cap},
        tied=True,
        scale_embedding=True,
    )


def _write2(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    soft_cap = config.stack.blocks[0].mixer.soft_cap
    return {**_write_sandwich(config, max_length), "attn_logit_softcapping": soft_cap}


def _read3(fields: Fields) -> DecoderConfig:
    fields.expect("use_bidirectional_attention", False)
    fields.expect("attn_logit_softcapping", None)
    pattern = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
    window = fields.take_nullable("sliding_window", 4096)
    windows = read_windows(fields, lambda layer: (layer + 1) % pattern != 0, window=window)
    # Before transformers 5, the other fields were about the layers that see everything.
    local = RotaryConfig(theta=float(fields.take("rope_local_base_freq", 10_000.0)))
    if "rope_parameters" in fields.values:
        local = read_rotary(fields, theta=local.theta, layer_type=SLIDING)
    rotary = read_rotary(fields, theta=1e6, layer_type=FULL)
    attention = read_attention(
        fields, qk_norm=_read_norm(fields), rotary=rotary, **_read_scale(fields), **read_biases(fields)
    )
    layers = with_windows(windows, rotary=local)
    return _read_sandwich(fields, attention, layers, _read_cap(fields, "final_logit_softcapping", None))


def _write3(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    fields = _write_sandwich(config, max_length)
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.pop(name, None)
    attentions = [block.mixer for block in config.stack.blocks]
    kinds = {SLIDING: [a for a in attentions if a.window], FULL: [a for a in attentions if not a.window]}
    rotary = {kind: (of_kind or attentions)[0].rotary for kind, of_kind in kinds.items()}
    return fields | {"rope_parameters": {kind: write_rotary(rotary[kind])["rope_parameters"] for kind in kinds}}


GEMMA = Family("gemma", "GemmaForCausalLM", "model.", RULES, _read, _write)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", "model.", SANDWICH_RULES, _read2, _write2)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", "model.", SANDWICH_RULES, _read3, _write3)
