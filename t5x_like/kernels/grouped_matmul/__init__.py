"""Grouped matrix products; see grouped_matmul.py."""

from t5x_like.kernels.grouped_matmul.grouped_matmul import grouped_matmul

__all__ = ["grouped_matmul"]
