"""Attention; see attention.py."""

from t5x_like.kernels.attention.attention import attention
from t5x_like.kernels.attention.biases import RelativeBias
from t5x_like.kernels.attention.masks import MaskSpec

__all__ = ["MaskSpec", "RelativeBias", "attention"]
