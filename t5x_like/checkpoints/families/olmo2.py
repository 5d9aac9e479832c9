"""OLMo 2: norms behind attention and MLP instead of before, queries and keys normalised over all heads."""

from typing import Any

from t5x_like.checkpoints.families.family import Family, Fields
from t5x_like.checkpoints.families.llama import OURS, THEIRS, read_biases, read_decoder, read_norm, write_decoder
from t5x_like.checkpoints.families.llama import RULES as LLAMA_RULES
from t5x_like.checkpoints.name_map import Rule
from t5x_like.models.transformer import DecoderConfig

NORMS = {
    f"{OURS}/attention_norm/scale": f"{THEIRS}.post_attention_layernorm.weight",
    f"{OURS}/feedforward_norm/scale": f"{THEIRS}.post_feedforward_layernorm.weight",
}

RULES = tuple(Rule(rule.ours, NORMS.get(rule.ours, rule.theirs), rule.layout) for rule in LLAMA_RULES)


def _read(fields: Fields) -> DecoderConfig:
    norm = read_norm(fields, epsilon=1e-5)
    attention = {"qk_norm": norm, "qk_norm_dims": "all_heads", **read_biases(fields)}
    return read_decoder(fields, norm=norm, attention=attention, norm_place="post_branch")


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    return {**write_decoder(config, max_length), "attention_bias": config.stack.blocks[0].attention.use_out_bias}


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", "model.", RULES, _read, _write)
