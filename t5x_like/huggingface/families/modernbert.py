"""ModernBERT: a pre-norm encoder with rotary positions, windows in two of three layers, and fused gated MLPs."""

import dataclasses
from types import MappingProxyType
from typing import Any

from t5x_like.huggingface.families.family import Family, Fields, written_activation, written_epsilon
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.heads.language_model import HeadTransformConfig, LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import InitializerConfig
from t5x_like.models.positions import RotaryConfig
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import EncoderConfig

OURS, THEIRS = "stack/*", "model.layers.*"
QKV = tuple(f"{OURS}/mixer/{name}" for name in ("query", "key", "value"))
HIDDEN = tuple(f"{OURS}/feedforward/{name}" for name in ("gate", "up"))

RULES = (
    Rule("embedding", "model.embeddings.tok_embeddings.weight"),
    Rule("embedding_norm/scale", "model.embeddings.norm.weight"),
    Rule("embedding_norm/bias", "model.embeddings.norm.bias"),
    Rule(f"{OURS}/mixer_norm/scale", f"{THEIRS}.attn_norm.weight"),
    Rule(f"{OURS}/mixer_norm/bias", f"{THEIRS}.attn_norm.bias"),
    Rule(tuple(f"{name}/kernel" for name in QKV), f"{THEIRS}.attn.Wqkv.weight", "linear"),
    Rule(tuple(f"{name}/bias" for name in QKV), f"{THEIRS}.attn.Wqkv.bias", "flat"),
    Rule(f"{OURS}/mixer/out/kernel", f"{THEIRS}.attn.Wo.weight", "linear_from_heads"),
    Rule(f"{OURS}/mixer/out/bias", f"{THEIRS}.attn.Wo.bias"),
    Rule(f"{OURS}/feedforward_norm/scale", f"{THEIRS}.mlp_norm.weight"),
    Rule(f"{OURS}/feedforward_norm/bias", f"{THEIRS}.mlp_norm.bias"),
    Rule(tuple(f"{name}/kernel" for name in HIDDEN), f"{THEIRS}.mlp.Wi.weight", "linear"),
    Rule(tuple(f"{name}/bias" for name in HIDDEN), f"{THEIRS}.mlp.Wi.bias"),
    Rule(f"{OURS}/feedforward/down/kernel", f"{THEIRS}.mlp.Wo.weight", "linear"),
    Rule(f"{OURS}/feedforward/down/bias", f"{THEIRS}.mlp.Wo.bias"),
    Rule("stack/final_norm/scale", "model.final_norm.weight"),
    Rule("stack/final_norm/bias", "model.final_norm.bias"),
    Rule("head/transform/kernel", "head.dense.weight", "linear"),
    Rule("head/transform/bias", "head.dense.bias"),
    Rule("head/transform_norm/scale", "head.norm.weight"),
    Rule("head/transform_norm/bias", "head.norm.bias"),
    Rule("head/bias", "decoder.bias"),
    Rule("head/projection", "decoder.weight"),
)

THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}
"""By type of layer: the field of older files, and its default."""


def _read_blocks(fields: Fields, norm: NormConfig) -> tuple[BlockConfig, ...]:
    num_layers, every = fields.need("num_hidden_layers"), fields.take("global_attn_every_n_layers", 3)
    kinds = fields.take(
        "layer_types", ["sliding_attention" if i % every else "full_attention" for i in range(num_layers)]
    )
    if len(kinds) != num_layers or not set(kinds) <= set(THETAS):
        raise fields.unsupported("layer_types", f"it must have {num_layers} of {' and '.join(THETAS)}")
    rotary, window = _read_rotary(fields), fields.take("local_attention", 128)
    use_bias = fields.take("attention_bias", False)
    attention = AttentionConfig(
        num_heads=fields.need("num_attention_heads"),
        use_qkv_bias=use_bias,
        use_out_bias=use_bias,
        dropout_rate=float(fields.take("attention_dropout", 0.0)),
    )
    feedforward = MLPConfig(
        d_ff=fields.need("intermediate_size"),
        activation=fields.activation("hidden_activation", "gelu"),
        use_bias=fields.take("mlp_bias", False),
        dropout_rate=float(fields.take("mlp_dropout", 0.0)),
    )

    def block(layer: int, kind: str) -> BlockConfig:
        own = {"rotary": rotary[kind], "window": window if kind == "sliding_attention" else None}
        return BlockConfig(
            mixer=dataclasses.replace(attention, **own),
            feedforward=feedforward,
            norm=norm,
            # The first layer reads what the embedding's norm has just normalised.
            norm_mixer=layer > 0,
        )

    return tuple(block(i, kind) for i, kind in enumerate(kinds))


def _cycle(blocks: tuple[BlockConfig, ...]) -> dict[str, Any]:
    """The blocks behind the first as the shortest cycle that gives them, in its order."""
    first, rest = blocks[:1], blocks[1:]
    size = next(n for n in range(1, len(rest) + 1) if all(block == rest[i % n] for i, block in enumerate(rest)))
    return {"first": first, "block": rest[:size]}


def _read_rotary(fields: Fields) -> dict[str, RotaryConfig]:
    nested = fields.take("rope_parameters") or {}
    rotary = {}
    for kind, (name, default) in THETAS.items():
        own = dict(nested.get(kind) or {})
        if own.pop("rope_type", "default") != "default" or set(own) - {"rope_theta"}:
            raise fields.unsupported("rope_parameters", "only the default rope_type is supported")
        theta = fields.take(name, default)
        rotary[kind] = RotaryConfig(theta=float(own.get("rope_theta", theta)))
    return rotary


class ModernBert(Family):
    model_type, architecture, prefix = "modernbert", "ModernBertForMaskedLM", "model."
    rules = RULES
    parts = frozenset({EncoderConfig, LanguageModelHeadConfig, AttentionConfig, MLPConfig})
    inert = frozenset({
        "initializer_cutoff_factor", "classifier_pooling", "classifier_dropout", "deterministic_flash_attn",
        "sparse_pred_ignore_index", "reference_compile", "repad_logits_with_grad", "cls_token_id", "sep_token_id",
        "position_embedding_type", "gradient_checkpointing", "layer_norm_eps",
    })  # fmt: skip
    copies = MappingProxyType({"decoder.weight": "model.embeddings.tok_embeddings.weight"})

    def read(self, fields: Fields) -> EncoderConfig:
        fields.expect("sparse_prediction", False)
        norm = NormConfig(
            kind="layernorm", use_bias=fields.take("norm_bias", False), epsilon=float(fields.take("norm_eps", 1e-5))
        )
        init = InitializerConfig(stddev=float(fields.take("initializer_range", 0.02)))
        blocks = _read_blocks(fields, norm)
        return EncoderConfig(
            d_model=fields.need("hidden_size"),
            vocab_size=fields.need("vocab_size"),
            embedding_norm=norm,
            stack=StackConfig(num_layers=len(blocks), **_cycle(blocks), final_norm=norm),
            head=LanguageModelHeadConfig(
                tie_embeddings=fields.take("tie_word_embeddings", True),
                transform=HeadTransformConfig(
                    activation=fields.activation("classifier_activation", "gelu"),
                    use_bias=fields.take("classifier_bias", False),
                    norm=norm,
                ),
                use_bias=fields.take("decoder_bias", True),
            ),
            dropout_rate=float(fields.take("embedding_dropout", 0.0)),
            kernel_init=init,
            embedding_init=init,
        )

    def write(self, config: EncoderConfig, max_length: int) -> dict[str, Any]:
        blocks, head = config.stack.blocks, config.head
        block, transform = blocks[0], head.transform or HeadTransformConfig()
        kinds = ["sliding_attention" if block.mixer.window else "full_attention" for block in blocks]
        thetas = {
            kind: next((b.mixer.rotary.theta for b, k in zip(blocks, kinds, strict=True)
                        if k == kind and b.mixer.rotary), default)
            for kind, (_, default) in THETAS.items()
        }  # fmt: skip
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": block.feedforward.d_ff,
            "num_hidden_layers": config.stack.num_layers,
            "num_attention_heads": block.mixer.num_heads,
            "hidden_activation": written_activation(block.feedforward.activation),
            "max_position_embeddings": max_length,
            "initializer_range": config.kernel_init.stddev,
            "norm_eps": written_epsilon(config),
            "norm_bias": bool(block.norm and block.norm.use_bias),
            "attention_bias": block.mixer.use_out_bias,
            "attention_dropout": block.mixer.dropout_rate,
            "layer_types": kinds,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
            "local_attention": next((b.mixer.window for b in blocks if b.mixer.window), 128),
            "embedding_dropout": config.dropout_rate,
            "mlp_bias": block.feedforward.use_bias,
            "mlp_dropout": block.feedforward.dropout_rate,
            "decoder_bias": head.use_bias,
            "classifier_bias": transform.use_bias,
            "classifier_activation": written_activation(transform.activation),
            "tie_word_embeddings": head.tie_embeddings,
        }


MODERNBERT = ModernBert()
