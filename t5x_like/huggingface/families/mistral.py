"""Mistral: Llama with a sliding window; Mixtral: with a mixture of experts in each layer."""

from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.layers import Layers
from t5x_like.huggingface.families.llama import ATTENTION, ENDS, NORMS, OURS, THEIRS, DecoderFamily
from t5x_like.huggingface.families.mixture import (
    MixtureFamily,
    first_mixture,
    read_mixture,
    with_mixtures,
    write_mixture,
)
from t5x_like.huggingface.families.rotary import read_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.norms import NormConfig
from t5x_like.models.positions import RotaryConfig
from t5x_like.models.transformer import DecoderConfig

EXPERTS = f"{THEIRS}.block_sparse_moe"


class Mistral(DecoderFamily):
    model_type, architecture = "mistral", "MistralForCausalLM"

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"window": fields.take_nullable("sliding_window", 4096)}

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        return {"sliding_window": config.stack.blocks[0].mixer.window}


class Mixtral(MixtureFamily):
    model_type, architecture = "mixtral", "MixtralForCausalLM"
    epsilon = 1e-5
    rules = (
        *ENDS,
        *NORMS,
        *ATTENTION,
        Rule(f"{OURS}/feedforward/router/kernel", f"{EXPERTS}.gate.weight", "linear"),
        Rule(f"{OURS}/feedforward/gate/kernel", f"{EXPERTS}.experts.#.w1.weight", "linear"),
        Rule(f"{OURS}/feedforward/up/kernel", f"{EXPERTS}.experts.#.w3.weight", "linear"),
        Rule(f"{OURS}/feedforward/down/kernel", f"{EXPERTS}.experts.#.w2.weight", "linear"),
    )

    def rotary(self, fields: Fields) -> RotaryConfig:
        return read_rotary(fields, theta=1e6)

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"window": fields.take("sliding_window")}

    def layers(self, fields: Fields) -> Layers:
        jitter = float(fields.take("router_jitter_noise", 0.0))
        return with_mixtures(read_mixture(fields, experts="num_local_experts", d_ff="intermediate_size", jitter=jitter))

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        mixture = first_mixture(config)
        return {
            "sliding_window": config.stack.blocks[0].mixer.window,
            **write_mixture(mixture, experts="num_local_experts", d_ff="intermediate_size"),
            "router_jitter_noise": mixture.jitter,
        }


MISTRAL, MIXTRAL = Mistral(), Mixtral()
