"""What a family states of itself, and the fields of `config.json` that families share."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5x_like.checkpoints.name_map import Rule
from t5x_like.errors import UserError
from t5x_like.models.feedforward import Activation
from t5x_like.models.positions import LinearScaling, Llama3Scaling, RotaryConfig, YarnScaling
from t5x_like.models.transformer import DecoderConfig

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

SCALINGS = {
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_length",
            "low_freq_factor": "low_frequency_turns",
            "high_freq_factor": "high_frequency_turns",
        },
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_length",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "whole_dims",
            "attention_factor": "attention_factor",
        },
    ),
}
"""Per `rope_type`: our class, and its fields by their names."""


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

    def check_all_taken(self, inert: set[str]) -> None:
        """Refuses fields that nothing has taken, unless they are null or do not change what the model computes."""
        left = sorted(name for name in self._left - INERT - inert if self.values[name] is not None)
        if left:
            raise self.unsupported(left[0], f"{self.values['model_type']} models are not known to have this field")


@dataclass(frozen=True)
class Family:
    """How Hugging Face writes a family of models.

    Attributes:
      model_type: `model_type` in config.json.
      architecture: class of the language model in transformers.
      prefix: that tensors of the language model have, and files of the bare model lack.
      rules: where its tensors are in our parameters.
      read: config.json -> our configuration.
      write: our configuration, and the longest text in tokens -> fields of config.json.
      inert: fields of config.json that do not change what this family computes.
    """

    model_type: str
    architecture: str
    prefix: str
    rules: tuple[Rule, ...]
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig, int], dict[str, Any]]
    inert: frozenset[str] = frozenset()


def written_activation(activation: Activation) -> str:
    return [theirs for theirs, ours in ACTIVATIONS.items() if ours == activation][-1]


def read_rotary(fields: Fields) -> RotaryConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    fields.expect("partial_rotary_factor", 1.0)
    theta, name = fields.take("rope_theta", 10_000.0), "rope_scaling"
    values = fields.take(name)
    if (current := fields.take("rope_parameters")) is not None and values is None:
        name, values = "rope_parameters", current
    values = {key: value for key, value in (values or {}).items() if value is not None}
    if any(isinstance(value, dict) for value in values.values()):
        raise fields.unsupported(name, "rotary positions that differ between layers are not supported")
    theta = values.pop("rope_theta", theta)
    old_kind = values.pop("type", "default")
    kind = values.pop("rope_type", old_kind)
    if kind == "default":
        cls, names = None, {}
    elif kind in SCALINGS:
        cls, names = SCALINGS[kind]
        if "original_max_position_embeddings" in names:
            values.setdefault("original_max_position_embeddings", fields.need("max_position_embeddings"))
    else:
        raise fields.unsupported(name, f"the rope_type must be default, {', '.join(SCALINGS)}")
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    if unknown := sorted(set(values) - set(names)):
        raise fields.unsupported(name, f"{unknown[0]} is not supported with rope_type {kind!r}")
    if cls is not None and "factor" not in values:
        raise fields.unsupported(name, f"rope_type {kind!r} needs a factor")
    scaling = cls and cls(**{names[key]: _like(cls, names[key], value) for key, value in values.items()})
    return RotaryConfig(theta=float(theta), scaling=scaling)


def _like(cls: type, field: str, value: Any) -> Any:
    """JSON writes 8.0 as 8 at times."""
    return float(value) if cls.__annotations__[field] in (float, float | None) else value


def write_rotary(rotary: RotaryConfig | None) -> dict[str, Any]:
    """In the spellings of transformers 5 and of those before it."""
    rotary = rotary or RotaryConfig()
    for kind, (cls, names) in SCALINGS.items():
        if type(rotary.scaling) is cls:
            values = {theirs: getattr(rotary.scaling, ours) for theirs, ours in names.items()}
            scaling = {"rope_type": kind, **{key: value for key, value in values.items() if value is not None}}
            both = {"rope_theta": rotary.theta, "rope_scaling": scaling}
            return {**both, "rope_parameters": {"rope_theta": rotary.theta, **scaling}}
    return {
        "rope_theta": rotary.theta,
        "rope_parameters": {"rope_theta": rotary.theta, "rope_type": "default"},
    }
