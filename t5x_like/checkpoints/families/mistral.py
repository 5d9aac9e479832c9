"""Mistral: Llama with a sliding window."""

from typing import Any

from t5x_like.checkpoints.families.family import Family, Fields
from t5x_like.checkpoints.families.llama import RULES, read_decoder, read_norm, write_decoder
from t5x_like.models.transformer import DecoderConfig


def _read(fields: Fields) -> DecoderConfig:
    window = fields.take_nullable("sliding_window", 4096)
    return read_decoder(fields, norm=read_norm(fields), attention={"window": window})


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    return {**write_decoder(config, max_length), "sliding_window": config.stack.blocks[0].attention.window}


MISTRAL = Family("mistral", "MistralForCausalLM", "model.", RULES, _read, _write)
