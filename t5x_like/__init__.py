"""t5x_like: train transformers with JAX, from one device to a pod."""

__version__ = "0.1.0"
