"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped SwiGLU."""

from typing import Any

from t5x_like.huggingface.families.family import MIXED_DECODER, Family, Fields
from t5x_like.huggingface.families.layers import read_windows, with_windows, write_windows
from t5x_like.huggingface.families.llama import (
    ATTENTION,
    ENDS,
    NORMS,
    OURS,
    THEIRS,
    read_attention,
    read_decoder,
    read_norm,
    write_attention,
    write_biases,
    write_decoder,
)
from t5x_like.huggingface.families.mixture import first_mixture, read_mixture, with_mixtures, write_mixture
from t5x_like.huggingface.families.rotary import read_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.feedforward.routers import SoftmaxRouterConfig
from t5x_like.models.positions import RotaryConfig, YarnScaling
from t5x_like.models.transformer import DecoderConfig

EXPERTS = f"{THEIRS}.mlp.experts"


def _gate_and_up(name: str) -> tuple[str, str]:
    return f"{OURS}/feedforward/gate/{name}", f"{OURS}/feedforward/up/{name}"


RULES = (
    *ENDS,
    *NORMS,
    *ATTENTION,
    Rule(f"{OURS}/mixer/sinks", f"{THEIRS}.self_attn.sinks"),
    Rule(f"{OURS}/feedforward/router/kernel", f"{THEIRS}.mlp.router.weight", "linear"),
    Rule(f"{OURS}/feedforward/router/bias", f"{THEIRS}.mlp.router.bias"),
    Rule(_gate_and_up("kernel"), f"{EXPERTS}.gate_up_proj", "interleaved"),
    Rule(_gate_and_up("bias"), f"{EXPERTS}.gate_up_proj_bias", "interleaved"),
    Rule(f"{OURS}/feedforward/down/kernel", f"{EXPERTS}.down_proj"),
    Rule(f"{OURS}/feedforward/down/bias", f"{EXPERTS}.down_proj_bias"),
)


def _read_rotary(fields: Fields) -> RotaryConfig:
    if fields.values.get("rope_parameters") or fields.values.get("rope_scaling"):
        return read_rotary(fields, theta=150_000.0)
    scaling = YarnScaling(factor=32.0, original_length=4096, whole_dims=False)
    return RotaryConfig(theta=float(fields.take("rope_theta", 150_000.0)), scaling=scaling)


def _read(fields: Fields) -> DecoderConfig:
    fields.expect("hidden_act", "silu")
    fields.expect("swiglu_alpha", 1.702)
    fields.expect("swiglu_limit", 7.0)
    windows = read_windows(fields, lambda layer: layer % 2 == 0, window=fields.take_nullable("sliding_window", 128))
    use_bias = fields.take("attention_bias", True)
    attention = read_attention(
        fields,
        head_dim=fields.take("head_dim", 64),
        rotary=_read_rotary(fields),
        sinks=True,
        use_qkv_bias=use_bias,
        use_out_bias=use_bias,
    )
    mixture = read_mixture(
        fields,
        experts="num_local_experts",
        d_ff="intermediate_size",
        activation="clamped_swiglu",
        use_bias=True,
        router=SoftmaxRouterConfig(use_bias=True),
    )
    layers = with_mixtures(mixture, then=with_windows(windows))
    return read_decoder(fields, norm=read_norm(fields, epsilon=1e-5), attention=attention, layers=layers)


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    return {
        **write_decoder(config, max_length),
        **write_attention(config),
        **write_biases(config),
        **write_windows(config.stack.blocks),
        **write_mixture(first_mixture(config), experts="num_local_experts", d_ff="intermediate_size"),
        "hidden_act": "silu",
    }


GPT_OSS = Family(
    "gpt_oss", "GptOssForCausalLM", "model.", RULES, _read, _write,
    parts=MIXED_DECODER,
    required=frozenset({MoEConfig}),
    inert=frozenset({"output_router_logits", "experts_per_token", "initial_context_length"}),
)  # fmt: skip
