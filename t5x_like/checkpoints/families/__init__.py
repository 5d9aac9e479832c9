"""The families of models that Hugging Face directories can hold."""

from t5x_like.checkpoints.families.bert import BERT, ROBERTA
from t5x_like.checkpoints.families.gemma import GEMMA
from t5x_like.checkpoints.families.gpt2 import GPT2
from t5x_like.checkpoints.families.llama import LLAMA
from t5x_like.checkpoints.families.mistral import MISTRAL
from t5x_like.checkpoints.families.modernbert import MODERNBERT
from t5x_like.checkpoints.families.olmo2 import OLMO2
from t5x_like.checkpoints.families.qwen import QWEN2, QWEN3
from t5x_like.checkpoints.families.t5 import MT5, T5

DECODERS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, OLMO2)
ENCODERS = (BERT, ROBERTA, MODERNBERT)
ENCODER_DECODERS = (T5, MT5)

FAMILIES = {family.model_type: family for family in (*DECODERS, *ENCODERS, *ENCODER_DECODERS)}
"""By `model_type`; a model that several can hold is exported as the first of them."""
