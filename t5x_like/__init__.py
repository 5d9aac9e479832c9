"""t5x_like: train transformers with JAX, from one device to a pod."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5x_like.inference.load import load as load

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # JAX and all else are imported when a model is loaded, not with the package.
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from t5x_like.inference.load import load

    return load
