"""Mistral: Llama with a sliding window; Mixtral: with a mixture of experts in each layer."""

from typing import Any

from t5x_like.huggingface.families.family import MIXED_DECODER, Family, Fields
from t5x_like.huggingface.families.llama import (
    ATTENTION,
    ENDS,
    NORMS,
    OURS,
    RULES,
    THEIRS,
    read_attention,
    read_decoder,
    read_norm,
    write_attention,
    write_decoder,
)
from t5x_like.huggingface.families.mixture import first_mixture, read_mixture, with_mixtures, write_mixture
from t5x_like.huggingface.families.rotary import read_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.transformer import DecoderConfig

EXPERTS = f"{THEIRS}.block_sparse_moe"

MIXTRAL_RULES = (
    *ENDS,
    *NORMS,
    *ATTENTION,
    Rule(f"{OURS}/feedforward/router/kernel", f"{EXPERTS}.gate.weight", "linear"),
    Rule(f"{OURS}/feedforward/gate/kernel", f"{EXPERTS}.experts.#.w1.weight", "linear"),
    Rule(f"{OURS}/feedforward/up/kernel", f"{EXPERTS}.experts.#.w3.weight", "linear"),
    Rule(f"{OURS}/feedforward/down/kernel", f"{EXPERTS}.experts.#.w2.weight", "linear"),
)


def _read(fields: Fields) -> DecoderConfig:
    attention = read_attention(fields, window=fields.take_nullable("sliding_window", 4096))
    return read_decoder(fields, norm=read_norm(fields), attention=attention)


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    window = config.stack.blocks[0].mixer.window
    return {**write_decoder(config, max_length), **write_attention(config), "sliding_window": window}


def _read_mixtral(fields: Fields) -> DecoderConfig:
    rotary = read_rotary(fields, theta=1e6)
    attention = read_attention(fields, window=fields.take("sliding_window"), rotary=rotary)
    mixture = read_mixture(
        fields,
        experts="num_local_experts",
        d_ff="intermediate_size",
        jitter=float(fields.take("router_jitter_noise", 0.0)),
    )
    norm = read_norm(fields, epsilon=1e-5)
    return read_decoder(fields, norm=norm, attention=attention, layers=with_mixtures(mixture))


def _write_mixtral(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    mixture = first_mixture(config)
    return {
        **_write(config, max_length),
        **write_mixture(mixture, experts="num_local_experts", d_ff="intermediate_size"),
        "router_jitter_noise": mixture.jitter,
    }


MISTRAL = Family("mistral", "MistralForCausalLM", "model.", RULES, _read, _write)
MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", "model.", MIXTRAL_RULES, _read_mixtral, _write_mixtral,
    parts=MIXED_DECODER,
    required=frozenset({MoEConfig}),
    inert=frozenset({"output_router_logits"}),
)  # fmt: skip
