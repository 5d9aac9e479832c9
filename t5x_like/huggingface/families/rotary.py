"""Rotary positions in `config.json`, in the spellings of transformers 5 and of those before it."""

import math
from typing import Any

from t5x_like.huggingface.families.family import Fields
from t5x_like.models.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RotaryConfig,
    RotaryScaling,
    YarnScaling,
)

SCALINGS = {
    "linear": (LinearScaling, {"factor": "factor"}),
    "dynamic": (DynamicScaling, {"factor": "factor"}),
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
    "longrope": (
        LongRopeScaling,
        {
            "short_factor": "short_factors",
            "long_factor": "long_factors",
            "original_max_position_embeddings": "original_length",
            "attention_factor": "attention_factor",
        },
    ),
}
"""Per `rope_type`: our class, and its fields by their names."""

ORIGINAL = "original_max_position_embeddings"


def read_rotary(
    fields: Fields, *, theta: float = 10_000.0, layer_type: str | None = None, partial: bool = False
) -> RotaryConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
      fields: of config.json.
      theta: the family's default.
      layer_type: for a family whose kinds of layers may differ: which kind.
      partial: whether the family may rotate a part of each head only.
    """
    name, values = rope_values(fields, layer_type)
    theta = float(values.pop("rope_theta", fields.take("rope_theta", theta)))
    fraction = float(values.pop("partial_rotary_factor", fields.take("partial_rotary_factor", 1.0)))
    if fraction != 1 and not partial:
        raise fields.unsupported(
            name if name in fields.values else "partial_rotary_factor",
            f"{fields.values['model_type']} models rotate whole heads, so partial_rotary_factor must be 1.0",
        )
    kind = values.pop("rope_type", "default")
    kind = "longrope" if kind == "su" else kind  # its first name in Phi-3's files
    if kind == "default":
        scaling = None
        values.pop(ORIGINAL, None)
        check_known(fields, name, kind, values, set())
    elif kind in SCALINGS:
        scaling = _read_scaling(fields, name, kind, values)
    else:
        raise fields.unsupported(name, f"the rope_type must be default, {', '.join(SCALINGS)}")
    return RotaryConfig(theta=theta, fraction=fraction, scaling=scaling)


def rope_values(fields: Fields, layer_type: str | None = None) -> tuple[str, dict[str, Any]]:
    """The field that rotary positions stand in, and what it says of a kind of layer."""
    name, values = "rope_scaling", fields.take("rope_scaling")
    if (current := fields.take("rope_parameters")) is not None and values is None:
        name, values = "rope_parameters", current
    values = values or {}
    if layer_type is not None and any(isinstance(value, dict) for value in values.values()):
        values = values.get(layer_type) or {}
    if any(isinstance(value, dict) for value in values.values()):
        raise fields.unsupported(name, f"all layers of {fields.values['model_type']} models rotate alike")
    values = {key: value for key, value in values.items() if value is not None}
    if (old_kind := values.pop("type", None)) is not None:
        values.setdefault("rope_type", old_kind)
    return name, values


def _read_scaling(fields: Fields, name: str, kind: str, values: dict[str, Any]) -> RotaryScaling:
    cls, names = SCALINGS[kind]
    longest = fields.take("max_position_embeddings", 0)
    if ORIGINAL in names:
        # Some files have it beside the other fields, where it takes precedence.
        original = fields.take(ORIGINAL, values.get(ORIGINAL)) or fields.need("max_position_embeddings")
        values[ORIGINAL] = original
        if kind in ("yarn", "longrope") and "factor" not in values and longest:
            values["factor"] = longest / original
    scales = [values.pop("mscale", 0), values.pop("mscale_all_dim", 0)] if kind == "yarn" else [0, 0]
    if all(scales) and "factor" in values:
        own, shared = (magnitude(values["factor"], scale) for scale in scales)
        values.setdefault("attention_factor", own / shared)
    if kind == "longrope":
        factor = values.pop("factor", 1.0)
        stretched = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(values[ORIGINAL]))
        values.setdefault("attention_factor", stretched)
    check_known(fields, name, kind, values, set(names))
    needed = {"factor", "short_factor", "long_factor"} & set(names)
    if missing := sorted(needed - set(values)):
        raise fields.unsupported(name, f"rope_type {kind!r} needs a {missing[0]}")
    ours = {names[key]: _like(cls, names[key], value) for key, value in values.items()}
    if cls is DynamicScaling:
        ours["original_length"] = fields.need("max_position_embeddings")
    return cls(**ours)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor on rotated queries and keys (Peng et al. 2023, section 3.4), with DeepSeek's scale."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def check_known(fields: Fields, name: str, kind: str, values: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(values) - known):
        raise fields.unsupported(name, f"{unknown[0]} is not supported with rope_type {kind!r}")


def _like(cls: type, field: str, value: Any) -> Any:
    """JSON writes 8.0 as 8 at times, and has lists only."""
    annotation = cls.__annotations__[field]
    if isinstance(value, list):
        return tuple(map(float, value))
    return float(value) if annotation in (float, float | None) else value


def write_rotary(rotary: RotaryConfig | None, *, partial: bool = False) -> dict[str, Any]:
    """In the spellings of transformers 5 and of those before it; `partial` as for `read_rotary`."""
    rotary = rotary or RotaryConfig()
    scaling = write_scaling(rotary.scaling)
    share = {"partial_rotary_factor": rotary.fraction} if partial else {}
    fields = {"rope_theta": rotary.theta, **share}
    fields |= {"rope_parameters": {"rope_theta": rotary.theta, **share, **(scaling or {"rope_type": "default"})}}
    if scaling:
        fields["rope_scaling"] = scaling
    if isinstance(rotary.scaling, DynamicScaling):
        fields["max_position_embeddings"] = rotary.scaling.original_length
    return fields


def write_scaling(scaling: RotaryScaling | None) -> dict[str, Any]:
    """`rope_scaling`; empty where there is none."""
    for kind, (cls, names) in SCALINGS.items():
        if type(scaling) is cls:
            values = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
            return {"rope_type": kind, **{key: value for key, value in values.items() if value is not None}}
    return {}
