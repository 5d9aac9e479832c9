"""The families of models that Hugging Face directories can hold."""

from t5x_like.checkpoints.families.gemma import GEMMA
from t5x_like.checkpoints.families.gpt2 import GPT2
from t5x_like.checkpoints.families.llama import LLAMA
from t5x_like.checkpoints.families.mistral import MISTRAL
from t5x_like.checkpoints.families.olmo2 import OLMO2
from t5x_like.checkpoints.families.qwen import QWEN2, QWEN3

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, OLMO2)}
"""By `model_type`; a model that several can hold is exported as the first of them."""
