"""OLMo 2: norms behind attention and MLP instead of before, queries and keys normalised over all heads."""

from typing import Any

from t5x_like.huggingface.families.family import Family, Fields
from t5x_like.huggingface.families.llama import (
    ATTENTION,
    ENDS,
    MLP,
    OURS,
    THEIRS,
    read_attention,
    read_biases,
    read_decoder,
    read_norm,
    write_attention,
    write_biases,
    write_decoder,
)
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.transformer import DecoderConfig

RULES = (
    *ENDS,
    Rule(f"{OURS}/mixer_norm/scale", f"{THEIRS}.post_attention_layernorm.weight"),
    Rule(f"{OURS}/feedforward_norm/scale", f"{THEIRS}.post_feedforward_layernorm.weight"),
    *ATTENTION,
    *MLP,
)


def _read(fields: Fields) -> DecoderConfig:
    norm = read_norm(fields, epsilon=1e-5)
    attention = read_attention(fields, qk_norm=norm, qk_norm_dims="all_heads", **read_biases(fields))
    return read_decoder(fields, norm=norm, attention=attention, block={"norm_place": "post_branch"})


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    return {**write_decoder(config, max_length), **write_attention(config), **write_biases(config)}


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", "model.", RULES, _read, _write)
