"""What a run's numbers depend on beside its configuration: versions of libraries."""

import importlib.metadata
import platform

import t5x_like


def versions() -> dict[str, str]:
    """Of this package, Python, and the libraries that results depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    libraries = {package: importlib.metadata.version(package) for package in packages}
    return {"t5x_like": t5x_like.__version__, **libraries, "python": platform.python_version()}
