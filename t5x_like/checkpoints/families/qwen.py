"""Qwen 2, with biases on queries, keys and values, and Qwen 3, with normalised queries and keys instead."""

from typing import Any

from t5x_like.checkpoints.families.family import Family, Fields
from t5x_like.checkpoints.families.llama import RULES, read_biases, read_decoder, read_norm, write_decoder
from t5x_like.models.transformer import DecoderConfig


def _read_window(fields: Fields) -> int | None:
    """The window, where all layers have the same."""
    num_layers, window = fields.need("num_hidden_layers"), fields.take_nullable("sliding_window", 4096)
    slides, first = fields.take("use_sliding_window", False), fields.take("max_window_layers", 28)
    sliding = lambda layer: "sliding_attention" if slides and layer >= first else "full_attention"
    kinds = set(fields.take("layer_types", map(sliding, range(num_layers))))
    if not kinds <= {"sliding_attention", "full_attention"} or len(kinds) > 1:
        name = "layer_types" if "layer_types" in fields.values else "max_window_layers"
        raise fields.unsupported(name, "all layers must attend fully, or all within the window")
    return window if kinds == {"sliding_attention"} else None


def _write_window(config: DecoderConfig) -> dict[str, Any]:
    window, num_layers = config.stack.blocks[0].attention.window, config.stack.num_layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0 if window else num_layers,
        "layer_types": ["sliding_attention" if window else "full_attention"] * num_layers,
    }


def _read2(fields: Fields) -> DecoderConfig:
    attention = {"use_qkv_bias": True, "window": _read_window(fields)}
    return read_decoder(fields, norm=read_norm(fields), attention=attention)


def _write2(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    return {**write_decoder(config, max_length), **_write_window(config)}


def _read3(fields: Fields) -> DecoderConfig:
    norm = read_norm(fields)
    attention = {
        "head_dim": fields.take("head_dim", 128),
        "qk_norm": norm,
        "window": _read_window(fields),
        **read_biases(fields),
    }
    return read_decoder(fields, norm=norm, attention=attention)


def _write3(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    bias = {"attention_bias": config.stack.blocks[0].attention.use_out_bias}
    return {**write_decoder(config, max_length), **bias, **_write_window(config)}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "model.", RULES, _read2, _write2, inert=frozenset({"use_mrope"}))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "model.", RULES, _read3, _write3)
