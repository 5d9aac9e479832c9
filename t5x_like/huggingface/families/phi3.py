"""Phi-3: Llama with fused projections, rotation of a part of each head, and LongRoPE."""

from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.llama import ENDS, NORMS, OURS, THEIRS, DecoderFamily
from t5x_like.huggingface.families.rotary import ORIGINAL, read_rotary, write_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.norms import NormConfig
from t5x_like.models.positions import LongRopeScaling, RotaryConfig
from t5x_like.models.transformer import DecoderConfig


class Phi3(DecoderFamily):
    model_type, architecture = "phi3", "Phi3ForCausalLM"
    epsilon = 1e-5
    inert = frozenset({ORIGINAL})
    rules = (
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

    def rotary(self, fields: Fields) -> RotaryConfig:
        return read_rotary(fields, partial=True)

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        fields.expect("attention_bias", False)
        return {"window": fields.take("sliding_window")}

    def block(self, fields: Fields) -> dict[str, Any]:
        return {"dropout_rate": float(fields.take("resid_pdrop", 0.0))}

    def decoder(self, fields: Fields) -> dict[str, Any]:
        return {"dropout_rate": float(fields.take("embd_pdrop", 0.0))}

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        block = config.stack.blocks[0]
        scaling = block.mixer.rotary and block.mixer.rotary.scaling
        original = scaling.original_length if isinstance(scaling, LongRopeScaling) else max_length
        return {
            **write_rotary(block.mixer.rotary, partial=True),
            # transformers takes it from here, whatever the rotary fields say.
            ORIGINAL: original,
            "sliding_window": block.mixer.window,
            "resid_pdrop": block.dropout_rate,
            "embd_pdrop": config.dropout_rate,
            "pad_token_id": None,  # transformers' default lies beyond a small vocabulary
        }


PHI3 = Phi3()
