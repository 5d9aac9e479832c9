"""Grouped matrix products behind one door; see door.py."""

from t5x_like.kernels.grouped_matmul.door import grouped_matmul

__all__ = ["grouped_matmul"]
