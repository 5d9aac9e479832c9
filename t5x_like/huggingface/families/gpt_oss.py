"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped SwiGLU."""

from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.layers import Layers, read_windows, with_windows, write_windows
from t5x_like.huggingface.families.llama import ATTENTION, ENDS, NORMS, OURS, THEIRS
from t5x_like.huggingface.families.mixture import (
    MixtureFamily,
    first_mixture,
    read_mixture,
    with_mixtures,
    write_mixture,
)
from t5x_like.huggingface.families.rotary import read_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.feedforward.routers import SoftmaxRouterConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.positions import RotaryConfig, YarnScaling
from t5x_like.models.transformer import DecoderConfig

EXPERTS = f"{THEIRS}.mlp.experts"


def _gate_and_up(name: str) -> tuple[str, str]:
    return f"{OURS}/feedforward/gate/{name}", f"{OURS}/feedforward/up/{name}"


class GptOss(MixtureFamily):
    model_type, architecture = "gpt_oss", "GptOssForCausalLM"
    epsilon = 1e-5
    inert = MixtureFamily.inert | {"experts_per_token", "initial_context_length"}
    rules = (
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

    def rotary(self, fields: Fields) -> RotaryConfig:
        if fields.values.get("rope_parameters") or fields.values.get("rope_scaling"):
            return read_rotary(fields, theta=150_000.0)
        scaling = YarnScaling(factor=32.0, original_length=4096, whole_dims=False)
        return RotaryConfig(theta=float(fields.take("rope_theta", 150_000.0)), scaling=scaling)

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"head_dim": fields.take("head_dim", 64), "sinks": True, **self.biases(fields, default=True)}

    def layers(self, fields: Fields) -> Layers:
        fields.expect("hidden_act", "silu")
        fields.expect("swiglu_alpha", 1.702)
        fields.expect("swiglu_limit", 7.0)
        windows = read_windows(fields, lambda layer: layer % 2 == 0, window=fields.take_nullable("sliding_window", 128))
        mixture = read_mixture(
            fields,
            experts="num_local_experts",
            d_ff="intermediate_size",
            activation="clamped_swiglu",
            use_bias=True,
            router=SoftmaxRouterConfig(use_bias=True),
        )
        return with_mixtures(mixture, then=with_windows(windows))

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        return {
            **self.write_biases(config),
            **write_windows(config.stack.blocks),
            **write_mixture(first_mixture(config), experts="num_local_experts", d_ff="intermediate_size"),
            "hidden_act": "silu",
        }


GPT_OSS = GptOss()
