"""GPT-2: learned positions, LayerNorm, biases everywhere, kernels kept as [in, out] with q, k and v in one tensor."""

from types import MappingProxyType
from typing import Any

from t5x_like.huggingface.families.family import Family, Fields, written_activation, written_epsilon
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.block import BlockConfig
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.parameters import InitializerConfig
from t5x_like.models.positions import LearnedPositionsConfig
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import DecoderConfig

OURS, THEIRS = "stack/*", "transformer.h.*"
QKV = tuple(f"{OURS}/mixer/{name}" for name in ("query", "key", "value"))

RULES = (
    Rule("embedding", "transformer.wte.weight"),
    Rule("positions/embedding", "transformer.wpe.weight"),
    Rule(f"{OURS}/mixer_norm/scale", f"{THEIRS}.ln_1.weight"),
    Rule(f"{OURS}/mixer_norm/bias", f"{THEIRS}.ln_1.bias"),
    Rule(tuple(f"{name}/kernel" for name in QKV), f"{THEIRS}.attn.c_attn.weight", "conv1d"),
    Rule(tuple(f"{name}/bias" for name in QKV), f"{THEIRS}.attn.c_attn.bias", "flat"),
    Rule(f"{OURS}/mixer/out/kernel", f"{THEIRS}.attn.c_proj.weight", "conv1d_from_heads"),
    Rule(f"{OURS}/mixer/out/bias", f"{THEIRS}.attn.c_proj.bias"),
    Rule(f"{OURS}/feedforward_norm/scale", f"{THEIRS}.ln_2.weight"),
    Rule(f"{OURS}/feedforward_norm/bias", f"{THEIRS}.ln_2.bias"),
    Rule(f"{OURS}/feedforward/up/kernel", f"{THEIRS}.mlp.c_fc.weight", "conv1d"),
    Rule(f"{OURS}/feedforward/up/bias", f"{THEIRS}.mlp.c_fc.bias"),
    Rule(f"{OURS}/feedforward/down/kernel", f"{THEIRS}.mlp.c_proj.weight", "conv1d"),
    Rule(f"{OURS}/feedforward/down/bias", f"{THEIRS}.mlp.c_proj.bias"),
    Rule("stack/final_norm/scale", "transformer.ln_f.weight"),
    Rule("stack/final_norm/bias", "transformer.ln_f.bias"),
    Rule("head/projection", "lm_head.weight"),
)


class GPT2Family(Family):
    model_type, architecture, prefix = "gpt2", "GPT2LMHeadModel", "transformer."
    rules = RULES
    inert = frozenset({
        "n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
        "summary_type", "summary_use_proj",
    })  # fmt: skip
    copies = MappingProxyType({"lm_head.weight": "transformer.wte.weight"})
    ignored = r".*\.attn\.(masked_)?bias"

    def read(self, fields: Fields) -> DecoderConfig:
        fields.expect("scale_attn_weights", True)
        fields.expect("scale_attn_by_inverse_layer_idx", False)
        fields.expect("add_cross_attention", False)
        d_model = fields.need("n_embd")
        norm = NormConfig(kind="layernorm", use_bias=True, epsilon=float(fields.take("layer_norm_epsilon", 1e-5)))
        init = InitializerConfig(stddev=float(fields.take("initializer_range", 0.02)))
        attention = AttentionConfig(
            num_heads=fields.need("n_head"),
            use_qkv_bias=True,
            use_out_bias=True,
            dropout_rate=float(fields.take("attn_pdrop", 0.1)),
        )
        feedforward = MLPConfig(
            d_ff=fields.take("n_inner", 4 * d_model),
            activation=fields.activation("activation_function", "gelu_new"),
            gated=False,
            use_bias=True,
        )
        dropout_rate = float(fields.take("resid_pdrop", 0.1))
        block = BlockConfig(mixer=attention, feedforward=feedforward, norm=norm, dropout_rate=dropout_rate)
        return DecoderConfig(
            d_model=d_model,
            stack=StackConfig(num_layers=fields.need("n_layer"), block=block, final_norm=norm),
            vocab_size=fields.need("vocab_size"),
            positions=LearnedPositionsConfig(max_length=fields.need("n_positions")),
            head=LanguageModelHeadConfig(tie_embeddings=fields.take("tie_word_embeddings", True)),
            dropout_rate=float(fields.take("embd_pdrop", 0.1)),
            kernel_init=init,
            embedding_init=init,
        )

    def write(self, config: DecoderConfig, max_length: int) -> dict[str, Any]:
        block = config.stack.blocks[0]
        known = config.positions and config.positions.max_length
        activation = block.feedforward.activation
        return {
            "vocab_size": config.vocab_size,
            "n_positions": known or max_length,
            "n_embd": config.d_model,
            "n_layer": config.stack.num_layers,
            "n_head": block.mixer.num_heads,
            "n_inner": block.feedforward.d_ff,
            "activation_function": "gelu_new" if activation == "gelu_tanh" else written_activation(activation),
            "resid_pdrop": block.dropout_rate,
            "embd_pdrop": config.dropout_rate,
            "attn_pdrop": block.mixer.dropout_rate,
            "layer_norm_epsilon": written_epsilon(config),
            "initializer_range": config.kernel_init.stddev,
            "tie_word_embeddings": config.head.tie_embeddings,
        }


GPT2 = GPT2Family()
