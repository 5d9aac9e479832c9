"""OLMo 2: norms behind attention and MLP instead of before, queries and keys normalised over all heads."""

from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.llama import ATTENTION, ENDS, MLP, OURS, THEIRS, DecoderFamily
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.norms import NormConfig


class Olmo2(DecoderFamily):
    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    epsilon = 1e-5
    rules = (
        *ENDS,
        Rule(f"{OURS}/mixer_norm/scale", f"{THEIRS}.post_attention_layernorm.weight"),
        Rule(f"{OURS}/feedforward_norm/scale", f"{THEIRS}.post_feedforward_layernorm.weight"),
        *ATTENTION,
        *MLP,
    )

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        return {"qk_norm": norm, "qk_norm_dims": "all_heads", **self.biases(fields)}

    def block(self, fields: Fields) -> dict[str, Any]:
        return {"norm_place": "post_branch"}


OLMO2 = Olmo2()
