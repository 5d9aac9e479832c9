"""The ten small models of the matrix, as gin: each with the data that it is for."""

from typing import NamedTuple

from t5x_like.sharding.mesh import MeshConfig

COMMON = """
include 'experiment.gin'
include 'optimizers/adamw_cosine.gin'
STEPS = 4
BATCH_SIZE = 8
SEQUENCE_LENGTH = 32
LEARNING_RATE = 1e-2
WARMUP_STEPS = 1
MESH = @MeshConfig()
MeshConfig.data = 1
DATA = @DataConfig()
DataConfig.source = @TextSource()
DataConfig.tokenizer = @ByteTokenizerConfig()
DataConfig.split = 'position'
TextSource.files = %TEXT_FILES
TEXT_FILES = %gin.REQUIRED
RunConfig.logging = @LoggingConfig()
LoggingConfig.every_steps = 1
LoggingConfig.tensorboard = False
LoggingConfig.progress = False
LoggingConfig.sample_tokens = 0
RunConfig.checkpoints = @CheckpointConfig()
CheckpointConfig.save_every_steps = 2
StackConfig.num_layers = 4
StackConfig.pipeline = @PipelineConfig()
PipelineConfig.num_microbatches = 4
StackConfig.block = @BlockConfig()
BlockConfig.mixer = @AttentionConfig()
BlockConfig.feedforward = @MLPConfig()
AttentionConfig.num_heads = 4
MLPConfig.d_ff = 32
"""

DECODER = """
MODEL = @DecoderConfig()
DecoderConfig.stack = @StackConfig()
DecoderConfig.d_model = 16
DecoderConfig.dtype = 'float32'
"""

ROTARY = "AttentionConfig.rotary = @RotaryConfig()\n"

MOE = """
BlockConfig.feedforward = @MoEConfig()
MoEConfig.num_experts = 4
MoEConfig.experts_per_token = 2
MoEConfig.d_ff = 16
"""

ENCODER = """
MODEL = @EncoderConfig()
EncoderConfig.stack = @StackConfig()
EncoderConfig.d_model = 16
EncoderConfig.dtype = 'float32'
EncoderConfig.embedding_norm = @NormConfig()
LanguageModelHeadConfig.transform = @HeadTransformConfig()
LanguageModelHeadConfig.use_bias = True
NormConfig.kind = 'layernorm'
DataConfig.objective = @MaskedLM()
DataConfig.layout = 'documents'
TextSource.document_separator = '. '
ByteTokenizerConfig.special_tokens = @SpecialTokens()
SpecialTokens.names = ('[MASK]', '[CLS]', '[SEP]')
"""

T5 = """
MODEL = @EncoderDecoderConfig()
EncoderDecoderConfig.encoder = @StackConfig()
EncoderDecoderConfig.decoder = @decoder/StackConfig()
EncoderDecoderConfig.d_model = 16
EncoderDecoderConfig.dtype = 'float32'
decoder/BlockConfig.cross_attention = @AttentionConfig()
AttentionConfig.scale = 1.0
StackConfig.position_bias = @RelativeBiasConfig()
LanguageModelHeadConfig.tie_embeddings = False
MLPConfig.activation = 'gelu_tanh'
DataConfig.objective = @SpanCorruption()
ByteTokenizerConfig.special_tokens = @SpecialTokens()
SpecialTokens.num_sentinels = 20
"""


class Model(NamedTuple):
    """A row of the matrix.

    Attributes:
      title: what the table calls it.
      gin: its configuration.
      writes: whether it generates text.
    """

    title: str
    gin: str
    writes: bool = True


MODELS = {
    "gpt": Model(
        "GPT-2",
        DECODER
        + """
DecoderConfig.positions = @LearnedPositionsConfig()
LearnedPositionsConfig.max_length = 64
AttentionConfig.use_qkv_bias = True
AttentionConfig.use_out_bias = True
MLPConfig.activation = 'gelu_tanh'
MLPConfig.gated = False
MLPConfig.use_bias = True
NormConfig.kind = 'layernorm'
NormConfig.use_bias = True
DecoderConfig.head = @LanguageModelHeadConfig()
BlockConfig.norm = @NormConfig()
StackConfig.final_norm = @NormConfig()
""",
    ),
    "llama": Model(
        "Llama, windows in turn",
        DECODER
        + ROTARY
        + """
StackConfig.block = (@local/BlockConfig(), @BlockConfig())
AttentionConfig.num_kv_heads = 2
local/AttentionConfig.window = 8
""",
    ),
    "deepseek": Model(
        "DeepSeek",
        DECODER
        + MOE
        + """
StackConfig.num_layers = 5
StackConfig.first = (@dense/BlockConfig(),)
dense/BlockConfig.feedforward = @MLPConfig()
BlockConfig.mixer = @LatentAttentionConfig()
LatentAttentionConfig.num_heads = 4
LatentAttentionConfig.kv_lora_rank = 8
LatentAttentionConfig.q_lora_rank = 12
LatentAttentionConfig.qk_nope_head_dim = 4
LatentAttentionConfig.qk_rope_head_dim = 4
LatentAttentionConfig.v_head_dim = 4
MoEConfig.shared_d_ff = 16
MoEConfig.router = @SigmoidRouterConfig()
MoEConfig.bias_update_rate = 0.001
""",
    ),
    "mixture": Model("Mixture of experts", DECODER + ROTARY + MOE),
    "bert": Model(
        "BERT",
        ENCODER
        + """
EncoderConfig.positions = @LearnedPositionsConfig()
LearnedPositionsConfig.max_length = 64
EncoderConfig.num_token_types = 2
LanguageModelHeadConfig.classify_pairs = True
MaskedLM.pairs = 'next'
StackConfig.final_norm = None
BlockConfig.norm = @NormConfig()
BlockConfig.norm_place = 'post'
NormConfig.use_bias = True
HeadTransformConfig.norm = @NormConfig()
AttentionConfig.use_qkv_bias = True
AttentionConfig.use_out_bias = True
MLPConfig.activation = 'gelu'
MLPConfig.gated = False
MLPConfig.use_bias = True
""",
        writes=False,
    ),
    "modernbert": Model(
        "ModernBERT",
        ENCODER
        + ROTARY
        + """
StackConfig.num_layers = 5
StackConfig.first = (@first/BlockConfig(),)
StackConfig.block = (@local/BlockConfig(), @BlockConfig())
first/BlockConfig.norm_mixer = False
local/AttentionConfig.window = 8
BlockConfig.norm = @NormConfig()
StackConfig.final_norm = @NormConfig()
HeadTransformConfig.norm = @NormConfig()
HeadTransformConfig.use_bias = False
MLPConfig.activation = 'gelu'
""",
        writes=False,
    ),
    "t5": Model("T5", T5),
    "t5_experts": Model("T5 with experts", T5 + MOE),
    "ul2": Model(
        "UL2 decoder",
        DECODER
        + ROTARY
        + """
DataConfig.objective = @PrefixLM()
""",
    ),
    "unlike": Model(
        "Unlike layers",
        DECODER
        + ROTARY
        + """
StackConfig.num_layers = 6
StackConfig.first = (@first/BlockConfig(),)
StackConfig.block = (@local/BlockConfig(), @BlockConfig())
first/MLPConfig.d_ff = 48
local/AttentionConfig.window = 8
local/BlockConfig.norm_place = 'sandwich'
""",
    ),
}

MESHES = {
    "one device": MeshConfig(data=1),
    "data=2 x tensor=2": MeshConfig(data=2, tensor=2),
    "fsdp=2 x stage=2": MeshConfig(data=1, fsdp=2, stage=2),
}
