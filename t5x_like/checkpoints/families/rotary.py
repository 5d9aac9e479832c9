"""Rotary positions in `config.json`, in the spellings of transformers 5 and of those before it."""

from typing import Any

from t5x_like.checkpoints.families.family import Fields
from t5x_like.models.positions import LinearScaling, Llama3Scaling, RotaryConfig, YarnScaling

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
