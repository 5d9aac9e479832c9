"""DeepSeek-V2 and V3: latent attention, dense layers first, then mixtures beside shared experts."""

import abc
import math
from typing import Any

import numpy as np

from t5x_like.huggingface.families.family import Fields
from t5x_like.huggingface.families.layers import Layers
from t5x_like.huggingface.families.llama import ENDS, MLP, NORMS, OURS, THEIRS
from t5x_like.huggingface.families.mixture import (
    EXPERTS,
    MixtureFamily,
    first_mixture,
    first_router,
    read_mixture,
    shared_rules,
    sparse_layers,
    with_mixtures,
    write_mixture,
)
from t5x_like.huggingface.families.rotary import magnitude, read_rotary, rope_values, write_rotary
from t5x_like.huggingface.name_map import Layout, Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.feedforward.routers import SigmoidRouterConfig, SoftmaxRouterConfig, TopKRouter
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.latent_attention import LatentAttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.positions import YarnScaling
from t5x_like.models.transformer import DecoderConfig


def _paired(size: int, rotated: int) -> Layout:
    """Linear, for outputs whose last `rotated` of `size` dims turn: in pairs of neighbours there, half apart here."""
    plain = size - rotated
    order = np.concatenate([np.arange(plain), plain + np.arange(rotated).reshape(2, -1).T.reshape(-1)])
    back = np.argsort(order)
    return Layout(
        lambda x: x[..., order].reshape(len(x), -1).T, lambda y, shape: y.T.reshape(shape)[..., back], fused_dim=0
    )


def _queries(block: BlockConfig) -> Layout:
    return _paired(block.mixer.query_head_dim, block.mixer.qk_rope_head_dim)


def _has_latent_queries(block: BlockConfig) -> bool:
    return block.mixer.q_lora_rank is not None


def _latents(block: BlockConfig) -> Layout:
    attention = block.mixer
    return _paired(attention.kv_lora_rank + attention.qk_rope_head_dim, attention.qk_rope_head_dim)


def _latent_biases(block: BlockConfig) -> Layout:
    paired = _latents(block)
    return Layout(
        lambda x: paired.to_theirs(x[None])[:, 0],
        lambda y, shape: paired.to_ours(y[:, None], (1, *shape))[0],
        fused_dim=0,
    )


ATTENTION = (
    Rule(f"{OURS}/mixer/query/kernel", f"{THEIRS}.self_attn.q_b_proj.weight", _queries, when=_has_latent_queries),
    Rule(f"{OURS}/mixer/query/kernel", f"{THEIRS}.self_attn.q_proj.weight", _queries),
    Rule(f"{OURS}/mixer/query_down/kernel", f"{THEIRS}.self_attn.q_a_proj.weight", "linear"),
    Rule(f"{OURS}/mixer/query_down/bias", f"{THEIRS}.self_attn.q_a_proj.bias"),
    Rule(f"{OURS}/mixer/query_norm/scale", f"{THEIRS}.self_attn.q_a_layernorm.weight"),
    Rule(f"{OURS}/mixer/kv_down/kernel", f"{THEIRS}.self_attn.kv_a_proj_with_mqa.weight", _latents),
    Rule(f"{OURS}/mixer/kv_down/bias", f"{THEIRS}.self_attn.kv_a_proj_with_mqa.bias", _latent_biases),
    Rule(f"{OURS}/mixer/kv_norm/scale", f"{THEIRS}.self_attn.kv_a_layernorm.weight"),
    Rule(f"{OURS}/mixer/kv_up/kernel", f"{THEIRS}.self_attn.kv_b_proj.weight", "linear"),
    Rule(f"{OURS}/mixer/out/kernel", f"{THEIRS}.self_attn.o_proj.weight", "linear_from_heads"),
    Rule(f"{OURS}/mixer/out/bias", f"{THEIRS}.self_attn.o_proj.bias"),
)

BALANCE_BIAS = f"{THEIRS}.mlp.gate.e_score_correction_bias"

RULES = (
    *ENDS,
    *NORMS,
    *ATTENTION,
    Rule(f"{OURS}/feedforward/router/kernel", f"{THEIRS}.mlp.gate.weight", "linear"),
    Rule(f"{OURS}/feedforward/router/balance_bias", BALANCE_BIAS, always_float32=True),
    *EXPERTS,
    *shared_rules("shared_experts"),
    *MLP,
)


def _scale(head_dim: int, factor: float, shared: float) -> float:
    """Of products, where YaRN's sharpening is applied to all dims instead of the rotated ones alone."""
    return head_dim**-0.5 * magnitude(factor, shared) ** 2


def _write_rotary(attention: LatentAttentionConfig) -> dict[str, Any]:
    fields, scaling = write_rotary(attention.rotary), attention.rotary.scaling
    if attention.scale is not None and isinstance(scaling, YarnScaling) and scaling.factor > 1:
        sharpening = math.sqrt(attention.scale * attention.query_head_dim**0.5)
        shared = round((sharpening - 1) / (0.1 * math.log(scaling.factor)), 9)
        fields |= {name: fields[name] | {"mscale_all_dim": shared} for name in ("rope_parameters", "rope_scaling")}
    return fields


class DeepSeek(MixtureFamily):
    """What both have in common; `read_router` is each one's own."""

    rules = RULES
    parts = frozenset({DecoderConfig, LanguageModelHeadConfig, LatentAttentionConfig, MLPConfig, MoEConfig})
    inert = MixtureFamily.inert | {
        "aux_loss_alpha", "ep_size", "head_dim", "num_mtp_layers", "num_nextn_predict_layers", "qk_head_dim", "seq_aux",
    }  # fmt: skip

    @abc.abstractmethod
    def read_router(self, fields: Fields) -> TopKRouter: ...

    def attention(self, fields: Fields, norm: NormConfig) -> LatentAttentionConfig:
        num_heads = fields.need("num_attention_heads")
        fields.expect("num_key_value_heads", num_heads)
        plain, rotated = fields.take("qk_nope_head_dim", 128), fields.take("qk_rope_head_dim", 64)
        _, values = rope_values(fields)
        rotary, scale = read_rotary(fields), None
        if shared := values.get("mscale_all_dim"):
            scale = _scale(plain + rotated, rotary.scaling.factor, shared)
        return LatentAttentionConfig(
            num_heads=num_heads,
            kv_lora_rank=fields.take("kv_lora_rank", 512),
            q_lora_rank=fields.take_nullable("q_lora_rank", 1536),
            qk_nope_head_dim=plain,
            qk_rope_head_dim=rotated,
            v_head_dim=fields.take("v_head_dim", 128),
            rotary=rotary,
            scale=scale,
            # Whatever rms_norm_eps says.
            norm=NormConfig(epsilon=1e-6),
            use_bias=fields.take("attention_bias", False),
            dropout_rate=float(fields.take("attention_dropout", 0.0)),
        )

    def layers(self, fields: Fields) -> Layers:
        fields.expect("moe_layer_freq", 1)
        dense = fields.take("first_k_dense_replace", 0)
        mixture = read_mixture(
            fields,
            experts="n_routed_experts",
            d_ff="moe_intermediate_size",
            router=self.read_router(fields),
            shared_d_ff=fields.need("n_shared_experts") * fields.need("moe_intermediate_size"),
        )
        return with_mixtures(mixture, lambda layer: layer >= dense)

    def write_attention(self, config: DecoderConfig) -> dict[str, Any]:
        attention = config.stack.blocks[0].mixer
        return {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_heads,
            "kv_lora_rank": attention.kv_lora_rank,
            "q_lora_rank": attention.q_lora_rank,
            "qk_nope_head_dim": attention.qk_nope_head_dim,
            "qk_rope_head_dim": attention.qk_rope_head_dim,
            "v_head_dim": attention.v_head_dim,
            "attention_bias": attention.use_bias,
            "attention_dropout": attention.dropout_rate,
            **_write_rotary(attention),
        }

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        mixture = first_mixture(config)
        router = first_router(config)
        return {
            **write_mixture(mixture, experts="n_routed_experts", d_ff="moe_intermediate_size"),
            "n_shared_experts": max((mixture.shared_d_ff or 0) // mixture.d_ff, 1),
            "first_k_dense_replace": sparse_layers(config)[0],
            "n_group": router.num_groups,
            "topk_group": router.groups_per_token,
            "routed_scaling_factor": router.scaling,
            "norm_topk_prob": router.renormalize,
        }


class DeepSeek2(DeepSeek):
    model_type, architecture = "deepseek_v2", "DeepseekV2ForCausalLM"

    def read_router(self, fields: Fields) -> TopKRouter:
        fields.expect("scoring_func", "softmax")
        fields.expect("mlp_bias", False)
        fields.expect("norm_topk_prob", False)
        groups, chosen = fields.take("n_group", 1), fields.take("topk_group", 1)
        method = fields.take("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise fields.unsupported("topk_method", "it must be greedy or group_limited_greedy")
        return SoftmaxRouterConfig(
            renormalize=False,
            num_groups=groups if method == "group_limited_greedy" else 1,
            groups_per_token=chosen if method == "group_limited_greedy" else 1,
            scaling=float(fields.take("routed_scaling_factor", 1.0)),
        )

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        fields = super().write_more(config, max_length)
        method = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
        return fields | {"topk_method": method, "norm_topk_prob": False}


class DeepSeek3(DeepSeek):
    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"
    # The published model's module for predicting several tokens, behind its 61 layers: transformers leaves it out too.
    ignored = r".*\.rotary_emb\.inv_freq|model\.layers\.61\..*"

    def read_router(self, fields: Fields) -> TopKRouter:
        fields.expect("scoring_func", "sigmoid")
        fields.expect("topk_method", "noaux_tc")
        fields.expect("rope_interleave", True)
        return SigmoidRouterConfig(
            renormalize=fields.take("norm_topk_prob", True),
            num_groups=fields.take("n_group", 8),
            groups_per_token=fields.take("topk_group", 4),
            scaling=float(fields.take("routed_scaling_factor", 2.5)),
        )


DEEPSEEK2, DEEPSEEK3 = DeepSeek2(), DeepSeek3()
