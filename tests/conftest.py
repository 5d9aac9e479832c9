"""Tests run on eight virtual CPU devices, with JAX's compilation cache on.

What costs time here is compiling, not computing: without LLVM's optimisations a cold run takes half of it. (Without
XLA's fusion emitters it would take less, but that compiler crashed once in a run of the suite.) Tests of what compilers
make (`-m tpu_compile`, `-m gpu_compile`), and whoever sets XLA_FLAGS, compile as users do. JAX_COMPILATION_CACHE_DIR
keeps the cache elsewhere.

With T5X_LIKE_TYPED=1 every call of a function of kernels and models is checked against its annotations, shapes
included, which finds annotations that are wrong: `T5X_LIKE_TYPED=1 pytest -m typed`.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "XLA_FLAGS",
    ""
    if "_compile" in " ".join(sys.argv)
    else "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "t5x_like-jax-cache"))

import hypothesis
import jax
import jaxtyping

TYPED = os.environ.get("T5X_LIKE_TYPED") == "1"
if TYPED:
    import tests.typed  # noqa: F401

    # Before anything imports them: what is imported already stays unchecked.
    jaxtyping.install_import_hook(["t5x_like.kernels", "t5x_like.models"], "tests.typed.check")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# The same examples in every run, and no deadlines, which a busy machine would miss.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
