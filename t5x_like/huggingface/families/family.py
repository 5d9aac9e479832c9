"""What a family states of itself, and the fields of `config.json` that families share."""

import abc
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from t5x_like.errors import UserError
from t5x_like.huggingface.name_map import Rule
from t5x_like.models.feedforward.mlp import Activation, MLPConfig
from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.heads.language_model import LanguageModelHeadConfig
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.norms import NormConfig
from t5x_like.models.transformer import DecoderConfig, EncoderConfig, ModelConfig

INERT = {
    "_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "dtype", "torch_dtype",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "pretraining_tp",
    "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "is_encoder_decoder", "task_specific_params", "torchscript", "use_bfloat16",
}  # fmt: skip
"""Fields of any family that do not change what the model computes from its weights."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "relu": "relu",
    "relu2": "squared_relu",
}
"""Their names to ours; of several the last is written."""


class Fields:
    """The fields of a `config.json`; each is taken by what understands it, and none may be left.

    Attributes:
      path: of the file.
      values: all fields.
    """

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values
        self._left = set(values)

    @classmethod
    def of_file(cls, path: Path) -> "Fields":
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} is no JSON object.")
        return cls(path, values)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field; null counts as absent. Without a default, a missing one is None."""
        self._left.discard(name)
        value = self.values.get(name)
        return default if value is None else value

    def take_nullable(self, name: str, default: Any) -> Any:
        """As `take`, where null is a value of its own and not the default."""
        self._left.discard(name)
        return self.values.get(name, default)

    def need(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise UserError(f"{self.path} has no field {name!r}: it is no complete model configuration.")
        return value

    def expect(self, name: str, value: Any) -> None:
        """Refuses any value but this one, which is also the default."""
        if self.take(name, value) != value:
            raise self.unsupported(name, f"only {value!r} is supported")

    def unsupported(self, name: str, why: str = "it is not supported") -> UserError:
        return UserError(f"{self.path}: {name} is {json.dumps(self.values.get(name))}: {why}.")

    def activation(self, name: str, default: str) -> Activation:
        value = self.take(name, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(name, f"choose among {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def check_all_taken(self, inert: frozenset[str]) -> None:
        """Refuses fields that nothing has taken, unless they are null or do not change what the model computes."""
        left = sorted(name for name in self._left - INERT - inert if self.values[name] is not None)
        if left:
            raise self.unsupported(left[0], f"{self.values['model_type']} models are not known to have this field")


DENSE_DECODER = frozenset({DecoderConfig, LanguageModelHeadConfig, AttentionConfig, MLPConfig})
MIXED_DECODER = DENSE_DECODER | {MoEConfig}


class Family(abc.ABC):
    """How Hugging Face writes a family of models.

    Attributes:
      model_type: `model_type` in config.json.
      architecture: class of the model in transformers.
      prefix: that tensors of the model without its head have, and files of the bare model lack.
      rules: where its tensors are in our parameters.
      parts: the classes of configuration that its models are made of: of model, head, attention and feed-forward.
      required: those of `parts` that all of its models have.
      inert: fields of config.json that do not change what this family computes.
      copies: tensors that some files have beside others which they equal: name of the copy -> of the original.
      ignored: pattern of tensors that are no weights of the model: masks and frequencies in older files.
    """

    model_type: str
    architecture: str
    prefix: str
    rules: tuple[Rule, ...]
    parts: frozenset[type] = DENSE_DECODER
    required: frozenset[type] = frozenset()
    inert: frozenset[str] = frozenset()
    copies: Mapping[str, str] = MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})
    ignored: str = r".*\.rotary_emb\.inv_freq"

    @abc.abstractmethod
    def read(self, fields: Fields) -> ModelConfig:
        """Our configuration."""

    @abc.abstractmethod
    def write(self, config: ModelConfig, max_length: int) -> dict[str, Any]:
        """Fields of config.json for a model made of `parts` alone and its longest text in tokens.

        What the family does not have is left out: reading the fields back shows it.
        """


def written_activation(activation: str) -> str:
    """The name in config.json; `silu` for one that transformers does not have, as reading it back shows."""
    return ([theirs for theirs, ours in ACTIVATIONS.items() if ours == activation] or ["silu"])[-1]


def written_epsilon(config: DecoderConfig | EncoderConfig) -> float:
    """Of the norm behind the last layer, where there is one."""
    return (config.stack.final_norm or NormConfig()).epsilon
