"""T5 1.0 and 1.1 (with FLAN-T5, UL2 and ByT5, which are T5 1.1 by their files) and mT5."""

import dataclasses
from types import MappingProxyType
from typing import Any

from t5x_like.huggingface.families.family import ACTIVATIONS, Family, Fields, written_activation
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.position_biases import RelativeBiasConfig
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import EncoderDecoderConfig


def _attention(ours: str, theirs: str, norm: str) -> tuple[Rule, ...]:
    return (
        *(Rule(f"{ours}/{name}/kernel", f"{theirs}.{name[0]}.weight", "linear") for name in ("query", "key", "value")),
        Rule(f"{ours}/out/kernel", f"{theirs}.o.weight", "linear_from_heads"),
        Rule(f"{ours}_norm/scale", f"{norm}.layer_norm.weight"),
    )


def _gated(block: BlockConfig) -> bool:
    return block.feedforward.gated


def _stack(name: str, feedforward_layer: int) -> tuple[Rule, ...]:
    ours, theirs = f"{name}/*", f"{name}.block.*.layer"
    of_attention = f"{theirs}.0.SelfAttention"
    table = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    mlp = f"{theirs}.{feedforward_layer}"
    return (
        *_attention(f"{ours}/mixer", of_attention, f"{theirs}.0"),
        Rule(f"{name}/position_bias/table", table, "linear"),
        *_attention(f"{ours}/cross_attention", f"{theirs}.1.EncDecAttention", f"{theirs}.1"),
        # The gated network has wi_0, which is activated, and wi_1; the other has wi.
        Rule(f"{ours}/feedforward/gate/kernel", f"{mlp}.DenseReluDense.wi_0.weight", "linear"),
        Rule(f"{ours}/feedforward/up/kernel", f"{mlp}.DenseReluDense.wi_1.weight", "linear", when=_gated),
        Rule(f"{ours}/feedforward/up/kernel", f"{mlp}.DenseReluDense.wi.weight", "linear"),
        Rule(f"{ours}/feedforward/down/kernel", f"{mlp}.DenseReluDense.wo.weight", "linear"),
        Rule(f"{ours}/feedforward_norm/scale", f"{mlp}.layer_norm.weight"),
        Rule(f"{name}/final_norm/scale", f"{name}.final_layer_norm.weight"),
    )


RULES = (
    Rule("embedding", "shared.weight"),
    *_stack("encoder", 1),
    *_stack("decoder", 2),
    Rule("head/projection", "lm_head.weight"),
)


def _read_feedforward(fields: Fields, dropout_rate: float) -> MLPConfig:
    kind = fields.take("feed_forward_proj", "relu")
    gated, _, name = kind.rpartition("-")
    # The files say gelu and mean its approximation.
    name = "gelu_new" if kind == "gated-gelu" else name
    if gated not in ("", "gated") or name not in ACTIVATIONS:
        raise fields.unsupported("feed_forward_proj", f"choose among {', '.join(ACTIVATIONS)}, or `gated-` and one")
    return MLPConfig(
        d_ff=fields.take("d_ff", 2048), activation=ACTIVATIONS[name], gated=bool(gated), dropout_rate=dropout_rate
    )


COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}


class T5Family(Family):
    model_type, architecture, prefix = "t5", "T5ForConditionalGeneration", ""
    rules = RULES
    parts = frozenset({EncoderDecoderConfig, LanguageModelHeadConfig, AttentionConfig, MLPConfig})
    inert = frozenset({
        "initializer_factor", "decoder_start_token_id", "classifier_dropout", "n_positions", "output_past",
        "is_decoder", "is_gated_act", "dense_act_fn", "gradient_checkpointing", "tokenizer_class",
    })  # fmt: skip
    copies = MappingProxyType(COPIES)
    # In the first files of T5; nothing reads it.
    ignored = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"

    def read_scaled(self, fields: Fields, tied: bool) -> bool:
        """T5 1.0 ties its embeddings and scales what it multiplies by them; transformers 5 has a field for it."""
        return fields.take("scale_decoder_outputs", tied)

    def read(self, fields: Fields) -> EncoderDecoderConfig:
        tied = fields.take("tie_word_embeddings", True)
        d_model, dropout_rate = fields.need("d_model"), float(fields.take("dropout_rate", 0.1))
        norm = NormConfig(epsilon=float(fields.take("layer_norm_epsilon", 1e-6)))
        attention = AttentionConfig(
            num_heads=fields.take("num_heads", 8),
            head_dim=fields.take("d_kv", 64),
            scale=1.0,
            dropout_rate=dropout_rate,
        )
        encoder = BlockConfig(
            mixer=attention, feedforward=_read_feedforward(fields, dropout_rate), norm=norm, dropout_rate=dropout_rate
        )
        bias = RelativeBiasConfig(
            num_buckets=fields.take("relative_attention_num_buckets", 32),
            max_distance=fields.take("relative_attention_max_distance", 128),
        )
        num_layers = fields.take("num_layers", 6)
        stack = StackConfig(num_layers=num_layers, block=encoder, position_bias=bias, final_norm=norm)
        return EncoderDecoderConfig(
            d_model=d_model,
            vocab_size=fields.need("vocab_size"),
            encoder=stack,
            decoder=dataclasses.replace(
                stack,
                num_layers=fields.take("num_decoder_layers", num_layers),
                block=dataclasses.replace(encoder, cross_attention=attention),
            ),
            head=LanguageModelHeadConfig(tie_embeddings=tied, scale_by_width=self.read_scaled(fields, tied)),
            dropout_rate=dropout_rate,
            residual_init="same",
        )

    def write(self, config: EncoderDecoderConfig, max_length: int) -> dict[str, Any]:
        block, bias = config.encoder.blocks[0], config.encoder.position_bias
        # Another bias cannot be written; what is read back will differ from it.
        bias = bias if type(bias) is RelativeBiasConfig else RelativeBiasConfig()
        feedforward = block.feedforward
        name = "gelu" if feedforward.gated and feedforward.activation == "gelu_tanh" else None
        name = name or written_activation(feedforward.activation)
        return {
            "vocab_size": config.vocab_size,
            "d_model": config.d_model,
            "d_kv": block.mixer.head_size(config.d_model),
            "d_ff": feedforward.d_ff,
            "num_layers": config.encoder.num_layers,
            "num_decoder_layers": config.decoder.num_layers,
            "num_heads": block.mixer.num_heads,
            "relative_attention_num_buckets": bias.num_buckets,
            "relative_attention_max_distance": bias.max_distance,
            "dropout_rate": block.dropout_rate,
            "layer_norm_epsilon": block.norm.epsilon if block.norm else 1e-6,
            "feed_forward_proj": f"gated-{name}" if feedforward.gated else name,
            "tie_word_embeddings": config.head.tie_embeddings,
            "scale_decoder_outputs": config.head.scale_by_width,
            "is_encoder_decoder": True,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        }


class MT5Family(T5Family):
    model_type, architecture = "mt5", "MT5ForConditionalGeneration"

    def read_scaled(self, fields: Fields, tied: bool) -> bool:
        return False


T5, MT5 = T5Family(), MT5Family()
