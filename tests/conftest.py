"""Tests run on eight virtual CPU devices, with JAX's compilation cache on."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "t5x_like-jax-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# The same examples in every run, and no deadlines, which a busy machine would miss.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
