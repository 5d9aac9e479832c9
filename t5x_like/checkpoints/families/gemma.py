"""Gemma 1: zero-centred norms, scaled embeddings, GeGLU."""

import dataclasses
from typing import Any

from t5x_like.checkpoints.families.family import Family, Fields
from t5x_like.checkpoints.families.llama import RULES, read_biases, read_decoder, read_norm, write_decoder
from t5x_like.models.transformer import DecoderConfig


def _read(fields: Fields) -> DecoderConfig:
    fields.expect("use_bidirectional_attention", False)
    fields.expect("hidden_activation", "gelu_pytorch_tanh")
    activation = fields.activation("hidden_act", "gelu_pytorch_tanh")
    return read_decoder(
        fields,
        norm=dataclasses.replace(read_norm(fields), zero_centered=True),
        attention={"head_dim": fields.take("head_dim", 256), **read_biases(fields)},
        # In Gemma's files "gelu" is a slip of the first release: the approximation is meant.
        activation="gelu_tanh" if activation == "gelu" else activation,
        tied=True,
        scale_embedding=True,
    )


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    return {**write_decoder(config, max_length), "attention_bias": config.stack.blocks[0].attention.use_out_bias}


GEMMA = Family("gemma", "GemmaForCausalLM", "model.", RULES, _read, _write)
