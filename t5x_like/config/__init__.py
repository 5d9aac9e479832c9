"""Strict gin: files and bindings in, validated dataclasses out, every mistake named with its place and its remedy."""

from t5x_like.config.bindings import ConfigError
from t5x_like.config.explain import explain, field_docs, print_config
from t5x_like.config.resolve import Config, parse_config
from t5x_like.config.save import config_text, operative_config_text, save_run_config

__all__ = [
    "Config",
    "ConfigError",
    "config_text",
    "explain",
    "field_docs",
    "operative_config_text",
    "parse_config",
    "print_config",
    "save_run_config",
]
