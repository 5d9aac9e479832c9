"""Llama 2 and 3, and what most families since have in common with it."""

from typing import Any

from t5x_like.huggingface.families.family import Family, Fields, written_activation, written_epsilon
from t5x_like.huggingface.families.layers import Layers, repeated
from t5x_like.huggingface.families.rotary import read_rotary, rope_values, write_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import Activation, MLPConfig
from t5x_like.models.heads import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.mixers.latent_attention import LatentAttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import InitializerConfig
from t5x_like.models.positions import LongRopeScaling
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import DecoderConfig

OURS, THEIRS = "stack/*", "model.layers.*"

ATTENTION = (
    Rule(f"{OURS}/mixer/query/kernel", f"{THEIRS}.self_attn.q_proj.weight", "linear"),
    Rule(f"{OURS}/mixer/query/bias", f"{THEIRS}.self_attn.q_proj.bias", "flat"),
    Rule(f"{OURS}/mixer/query_norm/scale", f"{THEIRS}.self_attn.q_norm.weight"),
    Rule(f"{OURS}/mixer/key/kernel", f"{THEIRS}.self_attn.k_proj.weight", "linear"),
    Rule(f"{OURS}/mixer/key/bias", f"{THEIRS}.self_attn.k_proj.bias", "flat"),
    Rule(f"{OURS}/mixer/key_norm/scale", f"{THEIRS}.self_attn.k_norm.weight"),
    Rule(f"{OURS}/mixer/value/kernel", f"{THEIRS}.self_attn.v_proj.weight", "linear"),
    Rule(f"{OURS}/mixer/value/bias", f"{THEIRS}.self_attn.v_proj.bias", "flat"),
    Rule(f"{OURS}/mixer/out/kernel", f"{THEIRS}.self_attn.o_proj.weight", "linear_from_heads"),
    Rule(f"{OURS}/mixer/out/bias", f"{THEIRS}.self_attn.o_proj.bias"),
)

NORMS = (
    Rule(f"{OURS}/mixer_norm/scale", f"{THEIRS}.input_layernorm.weight"),
    Rule(f"{OURS}/feedforward_norm/scale", f"{THEIRS}.post_attention_layernorm.weight"),
)


def mlp_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Of a gated MLP."""
    return tuple(
        rule
        for name in ("gate", "up", "down")
        for rule in (
            Rule(f"{ours}/{name}/kernel", f"{theirs}.{name}_proj.weight", "linear"),
            Rule(f"{ours}/{name}/bias", f"{theirs}.{name}_proj.bias"),
        )
    )


MLP = mlp_rules(f"{OURS}/feedforward", f"{THEIRS}.mlp")

ENDS = (
    Rule("embedding", "model.embed_tokens.weight"),
    Rule("stack/final_norm/scale", "model.norm.weight"),
    Rule("head/projection", "lm_head.weight"),
)

RULES = ENDS + NORMS + ATTENTION + MLP


def read_decoder(
    fields: Fields,
    *,
    norm: NormConfig,
    attention: AttentionConfig | LatentAttentionConfig,
    layers: Layers = lambda layer, block: block,
    activation: Activation | None = None,
    mlp_bias: bool = False,
    block: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    tied: bool = False,
    **decoder: Any,
) -> DecoderConfig:
    """A decoder with norms of one kind and a gated MLP.

    Args:
      fields: of config.json.
      norm: of all norms but those of queries and keys.
      attention: of all layers, but for what `layers` changes.
      layers: what differs between layers.
      activation: of the MLP; None: the field `hidden_act`.
      mlp_bias: as MLPConfig.use_bias.
      block: more fields of BlockConfig.
      head: more fields of LanguageModelHeadConfig.
      tied: the family's default for `tie_word_embeddings`.
      decoder: more fields of DecoderConfig.
    """
    init = InitializerConfig(stddev=float(fields.take("initializer_range", 0.02)))
    activation = activation or fields.activation("hidden_act", "silu")
    feedforward = MLPConfig(d_ff=fields.need("intermediate_size"), activation=activation, use_bias=mlp_bias)
    common = BlockConfig(mixer=attention, feedforward=feedforward, norm=norm, **(block or {}))
    num_layers = fields.need("num_hidden_layers")
    blocks = [layers(layer, common) for layer in range(num_layers)]
    tie_embeddings = fields.take("tie_word_embeddings", tied)
    return DecoderConfig(
        d_model=fields.need("hidden_size"),
        stack=StackConfig(num_layers=num_layers, final_norm=norm, **repeated(blocks)),
        vocab_size=fields.need("vocab_size"),
        head=LanguageModelHeadConfig(tie_embeddings=tie_embeddings, **(head or {})),
        kernel_init=init,
        embedding_init=init,
        **decoder,
    )


def read_attention(fields: Fields, **attention: Any) -> AttentionConfig:
    """Attention with rotary positions; `attention` is what the family adds to the fields that all have."""
    common = {
        "num_heads": fields.need("num_attention_heads"),
        "num_kv_heads": fields.take("num_key_value_heads"),
        "head_dim": fields.take("head_dim"),
        "dropout_rate": float(fields.take("attention_dropout", 0.0)),
    }
    if "rotary" not in attention:
        attention["rotary"] = read_rotary(fields)
    config = AttentionConfig(**{**common, **attention})
    scaling = config.rotary.scaling
    if isinstance(scaling, LongRopeScaling):
        half = config.rotary.rotated_dims(config.head_size(fields.need("hidden_size"))) // 2
        if len(scaling.short_factors) != half:
            name, _ = rope_values(fields)
            raise fields.unsupported(name, f"short_factor and long_factor must have {half} numbers, for pairs of dims")
    return config


def write_decoder(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    """The fields that `read_decoder` reads."""
    parts = [block.feedforward for block in config.stack.distinct]
    feedforward = next((part for part in parts if isinstance(part, MLPConfig)), parts[0])
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": feedforward.d_ff,
        "num_hidden_layers": config.stack.num_layers,
        "hidden_act": written_activation(feedforward.activation),
        "max_position_embeddings": max_length,
        "initializer_range": config.kernel_init.stddev,
        "rms_norm_eps": written_epsilon(config),
        "tie_word_embeddings": config.head.tie_embeddings,
    }


def write_attention(config: DecoderConfig) -> dict[str, Any]:
    """The fields that `read_attention` reads."""
    attention = config.stack.blocks[0].mixer
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size(config.d_model),
        "attention_dropout": attention.dropout_rate,
        **write_rotary(attention.rotary),
    }


def read_norm(fields: Fields, epsilon: float = 1e-6) -> NormConfig:
    return NormConfig(epsilon=float(fields.take("rms_norm_eps", epsilon)))


def read_biases(fields: Fields) -> dict[str, bool]:
    use_bias = fields.take("attention_bias", False)
    return {"use_qkv_bias": use_bias, "use_out_bias": use_bias}


def write_biases(config: DecoderConfig) -> dict[str, bool]:
    return {"attention_bias": config.stack.blocks[0].mixer.use_out_bias}


def _read(fields: Fields) -> DecoderConfig:
    attention = read_attention(fields, **read_biases(fields))
    return read_decoder(fields, norm=read_norm(fields), attention=attention, mlp_bias=fields.take("mlp_bias", False))


def _write(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    mlp_bias = config.stack.blocks[0].feedforward.use_bias
    return {
        **write_decoder(config, max_length),
        **write_attention(config),
        **write_biases(config),
        "mlp_bias": mlp_bias,
    }


LLAMA = Family("llama", "LlamaForCausalLM", "model.", RULES, _read, _write)
