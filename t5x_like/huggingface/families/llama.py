"""Llama 2 and 3, and what most families since have in common with it."""

from typing import Any

from t5x_like.huggingface.families.family import Family, Fields, written_activation, written_epsilon
from t5x_like.huggingface.families.layers import Layers, repeated
from t5x_like.huggingface.families.rotary import read_rotary, rope_values, write_rotary
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import Activation, MLPConfig
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.mixers.latent_attention import LatentAttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import InitializerConfig
from t5x_like.models.positions import LongRopeScaling, RotaryConfig
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


class DecoderFamily(Family):
    """Llama, and what is Llama but for what it overrides: norms of one kind, rotary positions, gated MLPs.

    Attributes:
      epsilon: the family's default for `rms_norm_eps`.
      tied: the family's default for `tie_word_embeddings`.
    """

    prefix = "model."
    rules = RULES
    epsilon = 1e-6
    tied = False

    def read(self, fields: Fields) -> DecoderConfig:
        norm = self.norm(fields)
        attention, layers = self.attention(fields, norm), self.layers(fields)
        init = InitializerConfig(stddev=float(fields.take("initializer_range", 0.02)))
        mlp = {"activation": self.activation(fields), **self.mlp(fields)}
        feedforward = MLPConfig(d_ff=fields.need("intermediate_size"), **mlp)
        common = BlockConfig(mixer=attention, feedforward=feedforward, norm=norm, **self.block(fields))
        num_layers = fields.need("num_hidden_layers")
        blocks = [layers(layer, common) for layer in range(num_layers)]
        tie_embeddings = fields.take("tie_word_embeddings", self.tied)
        return DecoderConfig(
            d_model=fields.need("hidden_size"),
            stack=StackConfig(num_layers=num_layers, final_norm=norm, **repeated(blocks)),
            vocab_size=fields.need("vocab_size"),
            head=LanguageModelHeadConfig(tie_embeddings=tie_embeddings, **self.head(fields)),
            kernel_init=init,
            embedding_init=init,
            **self.decoder(fields),
        )

    def norm(self, fields: Fields) -> NormConfig:
        """Of all norms but those of queries and keys."""
        return NormConfig(epsilon=float(fields.take("rms_norm_eps", self.epsilon)))

    def attention(self, fields: Fields, norm: NormConfig) -> AttentionConfig | LatentAttentionConfig:
        """Of all layers, but for what `layers` changes."""
        config = AttentionConfig(
            **{
                "num_heads": fields.need("num_attention_heads"),
                "num_kv_heads": fields.take("num_key_value_heads"),
                "head_dim": fields.take("head_dim"),
                "dropout_rate": float(fields.take("attention_dropout", 0.0)),
                "rotary": self.rotary(fields),
                **self.heads(fields, norm),
            }
        )
        scaling = config.rotary.scaling
        if isinstance(scaling, LongRopeScaling):
            half = config.rotary.rotated_dims(config.head_size(fields.need("hidden_size"))) // 2
            if len(scaling.short_factors) != half:
                name, _ = rope_values(fields)
                why = f"short_factor and long_factor must have {half} numbers, for pairs of dims"
                raise fields.unsupported(name, why)
        return config

    def rotary(self, fields: Fields) -> RotaryConfig:
        return read_rotary(fields)

    def heads(self, fields: Fields, norm: NormConfig) -> dict[str, Any]:
        """More fields of AttentionConfig, or other values of them."""
        return self.biases(fields)

    def biases(self, fields: Fields, default: bool = False) -> dict[str, bool]:
        use_bias = fields.take("attention_bias", default)
        return {"use_qkv_bias": use_bias, "use_out_bias": use_bias}

    def layers(self, fields: Fields) -> Layers:
        """What differs between layers."""
        return lambda layer, block: block

    def activation(self, fields: Fields) -> Activation:
        return fields.activation("hidden_act", "silu")

    def mlp(self, fields: Fields) -> dict[str, Any]:
        """More fields of MLPConfig."""
        return {}

    def block(self, fields: Fields) -> dict[str, Any]:
        """More fields of BlockConfig."""
        return {}

    def head(self, fields: Fields) -> dict[str, Any]:
        """More fields of LanguageModelHeadConfig."""
        return {}

    def decoder(self, fields: Fields) -> dict[str, Any]:
        """More fields of DecoderConfig."""
        return {}

    def write(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        parts = [block.feedforward for block in config.stack.distinct]
        feedforward = next((part for part in parts if part.num_experts is None), parts[0])
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
            **self.write_attention(config),
            **self.write_more(config, max_length),
        }

    def write_attention(self, config: DecoderConfig) -> dict[str, Any]:
        attention = config.stack.blocks[0].mixer
        return {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_size(config.d_model),
            "attention_dropout": attention.dropout_rate,
            **write_rotary(attention.rotary),
        }

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        """The fields beside those, or other values of them."""
        return self.write_biases(config)

    def write_biases(self, config: DecoderConfig) -> dict[str, Any]:
        return {"attention_bias": config.stack.blocks[0].mixer.use_out_bias}


class Llama(DecoderFamily):
    model_type, architecture = "llama", "LlamaForCausalLM"

    def mlp(self, fields: Fields) -> dict[str, Any]:
        return {"use_bias": fields.take("mlp_bias", False)}

    def write_more(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        return {**self.write_biases(config), "mlp_bias": config.stack.blocks[0].feedforward.use_bias}


LLAMA = Llama()
