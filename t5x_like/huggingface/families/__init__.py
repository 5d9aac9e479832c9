"""The families of models that Hugging Face directories can hold."""

from t5x_like.huggingface.families.bert import BERT, ROBERTA
from t5x_like.huggingface.families.deepseek import DEEPSEEK2, DEEPSEEK3
from t5x_like.huggingface.families.gemma import GEMMA, GEMMA2, GEMMA3
from t5x_like.huggingface.families.gpt2 import GPT2
from t5x_like.huggingface.families.gpt_oss import GPT_OSS
from t5x_like.huggingface.families.llama import LLAMA
from t5x_like.huggingface.families.mistral import MISTRAL, MIXTRAL
from t5x_like.huggingface.families.modernbert import MODERNBERT
from t5x_like.huggingface.families.olmo2 import OLMO2
from t5x_like.huggingface.families.phi3 import PHI3
from t5x_like.huggingface.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from t5x_like.huggingface.families.t5 import MT5, T5

DECODERS = (
    *(GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO2, PHI3),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS, DEEPSEEK2, DEEPSEEK3),
)
ENCODERS = (BERT, ROBERTA, MODERNBERT)
ENCODER_DECODERS = (T5, MT5)

FAMILIES = {family.model_type: family for family in (*DECODERS, *ENCODERS, *ENCODER_DECODERS)}
"""By `model_type`; a model that several can hold is exported as the first of them."""
