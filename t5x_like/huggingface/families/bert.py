"""BERT and RoBERTa: post-norm encoders with learned positions, token types and a transform before the vocabulary."""

from types import MappingProxyType
from typing import Any

from t5x_like.huggingface.families.family import Family, Fields, written_activation
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.heads.language_model import HeadTransformConfig, LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import InitializerConfig
from t5x_like.models.positions import LearnedPositionsConfig
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import EncoderConfig

PRETRAINING = "BertForPreTraining"
"""The class that also classifies pairs."""


def _body(prefix: str) -> tuple[Rule, ...]:
    ours, theirs = "stack/*", f"{prefix}.encoder.layer.*"
    norms = {
        "embedding_norm": f"{prefix}.embeddings.LayerNorm",
        f"{ours}/mixer_norm": f"{theirs}.attention.output.LayerNorm",
        f"{ours}/feedforward_norm": f"{theirs}.output.LayerNorm",
    }
    projections = {name: f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")}
    linears = {
        f"{ours}/mixer/out": (f"{theirs}.attention.output.dense", "linear_from_heads"),
        f"{ours}/feedforward/up": (f"{theirs}.intermediate.dense", "linear"),
        f"{ours}/feedforward/down": (f"{theirs}.output.dense", "linear"),
    }
    return (
        Rule("embedding", f"{prefix}.embeddings.word_embeddings.weight"),
        Rule("positions/embedding", f"{prefix}.embeddings.position_embeddings.weight"),
        Rule("token_types", f"{prefix}.embeddings.token_type_embeddings.weight"),
        *(Rule(f"{a}/scale", f"{b}.weight") for a, b in norms.items()),
        *(Rule(f"{a}/bias", f"{b}.bias") for a, b in norms.items()),
        *(Rule(f"{ours}/mixer/{a}/kernel", f"{b}.weight", "linear") for a, b in projections.items()),
        *(Rule(f"{ours}/mixer/{a}/bias", f"{b}.bias", "flat") for a, b in projections.items()),
        *(Rule(f"{a}/kernel", f"{b}.weight", layout) for a, (b, layout) in linears.items()),
        *(Rule(f"{a}/bias", f"{b}.bias") for a, (b, _) in linears.items()),
    )


def _linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/kernel", f"{theirs}.weight", "linear"), Rule(f"{ours}/bias", f"{theirs}.bias")


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


BERT_RULES = (
    *_body("bert"),
    *_linear("head/transform", "cls.predictions.transform.dense"),
    *_norm("head/transform_norm", "cls.predictions.transform.LayerNorm"),
    Rule("head/bias", "cls.predictions.bias"),
    Rule("head/projection", "cls.predictions.decoder.weight"),
    *_linear("head/pairs/hidden", "bert.pooler.dense"),
    *_linear("head/pairs/out", "cls.seq_relationship"),
)
ROBERTA_RULES = (
    *_body("roberta"),
    *_linear("head/transform", "lm_head.dense"),
    *_norm("head/transform_norm", "lm_head.layer_norm"),
    Rule("head/bias", "lm_head.bias"),
    Rule("head/projection", "lm_head.decoder.weight"),
)


class Bert(Family):
    model_type, architecture, prefix = "bert", PRETRAINING, "bert."
    rules = BERT_RULES
    parts = frozenset({EncoderConfig, LanguageModelHeadConfig, AttentionConfig, MLPConfig})
    inert = frozenset({"classifier_dropout", "gradient_checkpointing"})
    copies = MappingProxyType({
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    })  # fmt: skip
    ignored = r".*\.position_ids"

    def offset(self, fields: Fields) -> int:
        """Where positions begin."""
        return 0

    def classifies_pairs(self, fields: Fields) -> bool:
        return PRETRAINING in (fields.take("architectures") or [PRETRAINING])

    def read(self, fields: Fields) -> EncoderConfig:
        for name in ("is_decoder", "add_cross_attention"):
            fields.expect(name, False)
        fields.expect("position_embedding_type", "absolute")
        norm = NormConfig(kind="layernorm", use_bias=True, epsilon=float(fields.take("layer_norm_eps", 1e-12)))
        init = InitializerConfig(stddev=float(fields.take("initializer_range", 0.02)))
        dropout_rate = float(fields.take("hidden_dropout_prob", 0.1))
        activation = fields.activation("hidden_act", "gelu")
        attention = AttentionConfig(
            num_heads=fields.need("num_attention_heads"),
            use_qkv_bias=True,
            use_out_bias=True,
            dropout_rate=float(fields.take("attention_probs_dropout_prob", 0.1)),
        )
        feedforward = MLPConfig(
            d_ff=fields.need("intermediate_size"), activation=activation, gated=False, use_bias=True
        )
        block = BlockConfig(
            mixer=attention, feedforward=feedforward, norm=norm, norm_place="post", dropout_rate=dropout_rate
        )
        return EncoderConfig(
            d_model=fields.need("hidden_size"),
            vocab_size=fields.need("vocab_size"),
            positions=LearnedPositionsConfig(
                max_length=fields.take("max_position_embeddings", 512), offset=self.offset(fields)
            ),
            num_token_types=fields.take("type_vocab_size", 2),
            embedding_norm=norm,
            stack=StackConfig(num_layers=fields.need("num_hidden_layers"), block=block, final_norm=None),
            head=LanguageModelHeadConfig(
                tie_embeddings=fields.take("tie_word_embeddings", True),
                transform=HeadTransformConfig(activation=activation, norm=norm),
                use_bias=True,
                classify_pairs=self.classifies_pairs(fields),
            ),
            dropout_rate=dropout_rate,
            kernel_init=init,
            residual_init="same",
            embedding_init=init,
        )

    def write(self, config: EncoderConfig, max_length: int) -> dict[str, Any]:
        block, positions = config.stack.blocks[0], config.positions
        return {
            "architectures": [PRETRAINING if config.head.classify_pairs else "BertForMaskedLM"],
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.stack.num_layers,
            "num_attention_heads": block.mixer.num_heads,
            "intermediate_size": block.feedforward.d_ff,
            "hidden_act": written_activation(block.feedforward.activation),
            "hidden_dropout_prob": block.dropout_rate,
            "attention_probs_dropout_prob": block.mixer.dropout_rate,
            "max_position_embeddings": (positions and positions.max_length) or max_length,
            "type_vocab_size": config.num_token_types,
            "layer_norm_eps": block.norm.epsilon if block.norm else 1e-12,
            "initializer_range": config.kernel_init.stddev,
            "tie_word_embeddings": config.head.tie_embeddings,
        }


class Roberta(Bert):
    model_type, architecture, prefix = "roberta", "RobertaForMaskedLM", "roberta."
    rules = ROBERTA_RULES
    copies = MappingProxyType({
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    })  # fmt: skip

    def offset(self, fields: Fields) -> int:
        # Behind the number of its padding token.
        return fields.take("pad_token_id", 1) + 1

    def classifies_pairs(self, fields: Fields) -> bool:
        return False

    def write(self, config: EncoderConfig, max_length: int) -> dict[str, Any]:
        offset = config.positions.offset if config.positions else 2
        fields = {**super().write(config, max_length), "architectures": [self.architecture]}
        return {**fields, "pad_token_id": offset - 1}


BERT, ROBERTA = Bert(), Roberta()
