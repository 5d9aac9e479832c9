"""Llama 2 and 3, and what most families since have in common with it."""

from typing import Any

from t5x_like.checkpoints.families.family import Family, Fields, written_activation, written_epsilon
from t5x_like.checkpoints.families.rotary import read_rotary, write_rotary
from t5x_like.checkpoints.name_map import Rule
from t5x_like.models.attention import AttentionConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward import Activation, MLPConfig
from t5x_like.models.heads import LanguageModelHeadConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import InitializerConfig
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import DecoderConfig

OURS, THEIRS = "stack/*", "model.layers.*"

RULES = (
    Rule("embedding", "model.embed_tokens.weight"),
    Rule(f"{OURS}/attention_norm/scale", f"{THEIRS}.input_layernorm.weight"),
    Rule(f"{OURS}/attention/query/kernel", f"{THEIRS}.self_attn.q_proj.weight", "linear"),
    Rule(f"{OURS}/attention/query/bias", f"{THEIRS}.self_attn.q_proj.bias", "flat"),
    Rule(f"{OURS}/attention/query_norm/scale", f"{THEIRS}.self_attn.q_norm.weight"),
    Rule(f"{OURS}/attention/key/kernel", f"{THEIRS}.self_attn.k_proj.weight", "linear"),
    Rule(f"{OURS}/attention/key/bias", f"{THEIRS}.self_attn.k_proj.bias", "flat"),
    Rule(f"{OURS}/attention/key_norm/scale", f"{THEIRS}.self_attn.k_norm.weight"),
    Rule(f"{OURS}/attention/value/kernel", f"{THEIRS}.self_attn.v_proj.weight", "linear"),
    Rule(f"{OURS}/attention/value/bias", f"{THEIRS}.self_attn.v_proj.bias", "flat"),
    Rule(f"{OURS}/attention/out/kernel", f"{THEIRS}.self_attn.o_proj.weight", "linear_from_heads"),
    Rule(f"{OURS}/attention/out/bias", f"{THEIRS}.self_attn.o_proj.bias"),
    Rule(f"{OURS}/feedforward_norm/scale", f"{THEIRS}.post_attention_layernorm.weight"),
    Rule(f"{OURS}/feedforward/gate/kernel", f"{THEIRS}.mlp.gate_proj.weight", "linear"),
    Rule(f"{OURS}/feedforward/gate/bias", f"{THEIRS}.mlp.gate_proj.bias"),
    Rule(f"{OURS}/feedforward/up/kernel", f"{THEIRS}.mlp.up_proj.weight", "linear"),
    Rule(f"{OURS}/feedforward/up/bias", f"{THEIRS}.mlp.up_proj.bias"),
    Rule(f"{OURS}/feedforward/down/kernel", f"{THEIRS}.mlp.down_proj.weight", "linear"),
    Rule(f"{OURS}/feedforward/down/bias", f"{THEIRS}.mlp.down_proj.bias"),
    Rule("stack/final_norm/scale", "model.norm.weight"),
    Rule("head/projection", "lm_head.weight"),
)


def read_decoder(
    fields: Fields,
    *,
    norm: NormConfig,
    attention: dict[str, Any],
    activation: Activation | None = None,
    mlp_bias: bool = False,
    norm_place: str = "pre",
    tied: bool = False,
    scale_embedding: bool = False,
) -> DecoderConfig:
    """A decoder with rotary positions, norms of one kind and a gated MLP.

    Args:
      fields: of config.json.
      norm: of all norms but those of queries and keys.
      attention: what the family adds to the fields of AttentionConfig that all have.
      activation: of the MLP; None: the field `hidden_act`.
      mlp_bias: as MLPConfig.use_bias.
      norm_place: as BlockConfig.norm_place.
      tied: the family's default for `tie_word_embeddings`.
      scale_embedding: as DecoderConfig.scale_embedding.
    """
    init = InitializerConfig(stddev=float(fields.take("initializer_range", 0.02)))
    attention_config = AttentionConfig(
        num_heads=fields.need("num_attention_heads"),
        num_kv_heads=fields.take("num_key_value_heads"),
        rotary=read_rotary(fields),
        dropout_rate=float(fields.take("attention_dropout", 0.0)),
        **{"head_dim": fields.take("head_dim"), **attention},
    )
    activation = activation or fields.activation("hidden_act", "silu")
    feedforward = MLPConfig(d_ff=fields.need("intermediate_size"), activation=activation, use_bias=mlp_bias)
    block = BlockConfig(attention=attention_config, feedforward=feedforward, norm=norm, norm_place=norm_place)
    return DecoderConfig(
        d_model=fields.need("hidden_size"),
        stack=StackConfig(num_layers=fields.need("num_hidden_layers"), block=block, final_norm=norm),
        vocab_size=fields.need("vocab_size"),
        scale_embedding=scale_embedding,
        head=LanguageModelHeadConfig(tie_embeddings=fields.take("tie_word_embeddings", tied)),
        kernel_init=init,
        embedding_init=init,
    )


def write_decoder(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    """The fields that `read_decoder` reads."""
    block = config.stack.blocks[0]
    attention, feedforward = block.attention, block.feedforward
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": feedforward.d_ff,
        "num_hidden_layers": config.stack.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size(config.d_model),
        "hidden_act": written_activation(feedforward.activation),
        "max_position_embeddings": max_length,
        "initializer_range": config.kernel_init.stddev,
        "rms_norm_eps": written_epsilon(config),
        "attention_dropout": attention.dropout_rate,
        "tie_word_embeddings": config.head.tie_embeddings,
        **write_rotary(attention.rotary),
    }


def read_norm(fields: Fields, epsilon: float = 1e-6) -> NormConfig:
    return NormConfig(epsilon=float(fields.take("rms_norm_eps", epsilon)))


def read_biases(fields: Fields) -> dict[str, bool]:
    use_bias = fields.take("attention_bias", False)
    return {"use_qkv_bias": use_bias, "use_out_bias": use_bias}


def _read(fields: Fields) -> DecoderConfig:
    mlp_bias = fields.take("mlp_bias", False)
    return read_decoder(fields, norm=read_norm(fields), attention=read_biases(fields), mlp_bias=mlp_bias)


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    block = config.stack.blocks[0]
    return {
        **write_decoder(config, max_length),
        "attention_bias": block.attention.use_out_bias,
        "mlp_bias": block.feedforward.use_bias,
    }


LLAMA = Family("llama", "LlamaForCausalLM", "model.", RULES, _read, _write)
