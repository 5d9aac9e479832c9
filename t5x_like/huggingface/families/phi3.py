"""Phi-3: Llama with fused projections, rotation of a part of each head, and LongRoPE."""

from typing import Any

from t5x_like.huggingface.families.family import Family, Fields
from t5x_like.huggingface.families.llama import (
    ENDS,
    NORMS,
    OURS,
    THEIRS,
    read_attention,
    read_decoder,
    read_norm,
    write_attention,
    write_decoder,
)
from t5x_like.huggingface.families.rotary import ORIGINAL, read_rotary, write_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.positions import LongRopeScaling
from t5x_like.models.transformer import DecoderConfig

RULES = (
    *ENDS,
    *NORMS,
    Rule(
        tuple(f"{OURS}/mixer/{name}/kernel" for name in ("query", "key", "value")),
        f"{THEIRS}.self_attn.qkv_proj.weight",
        "linear",
    ),
    Rule(f"{OURS}/mixer/out/kernel", f"{THEIRS}.self_attn.o_proj.weight", "linear_from_heads"),
    Rule(
        tuple(f"{OURS}/feedforward/{name}/kernel" for name in ("gate", "up")),
        f"{THEIRS}.mlp.gate_up_proj.weight",
        "linear",
    ),
    Rule(f"{OURS}/feedforward/down/kernel", f"{THEIRS}.mlp.down_proj.weight", "linear"),
)


def _read(fields: Fields) -> DecoderConfig:
    fields.expect("attention_bias", False)
    rotary = read_rotary(fields, partial=True)
    return read_decoder(
        fields,
        norm=read_norm(fields, epsilon=1e-5),
        attention=read_attention(fields, rotary=rotary, window=fields.take("sliding_window")),
        block={"dropout_rate": float(fields.take("resid_pdrop", 0.0))},
        dropout_rate=float(fields.take("embd_pdrop", 0.0)),
    )


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    block = config.stack.blocks[0]
    scaling = block.mixer.rotary and block.mixer.rotary.scaling
    original = scaling.original_length if isinstance(scaling, LongRopeScaling) else max_length
    return {
        **write_decoder(config, max_length),
        **write_attention(config),
        **write_rotary(block.mixer.rotary, partial=True),
        # transformers takes it from here, whatever the rotary fields say.
        ORIGINAL: original,
        "sliding_window": block.mixer.window,
        "resid_pdrop": block.dropout_rate,
        "embd_pdrop": config.dropout_rate,
        "pad_token_id": None,  # transformers' default lies beyond a small vocabulary
    }


PHI3 = Family("phi3", "Phi3ForCausalLM", "model.", RULES, _read, _write, inert=frozenset({ORIGINAL}))
