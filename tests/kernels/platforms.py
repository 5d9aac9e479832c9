"""Running and lowering kernels without the accelerator that they are for."""

import contextlib

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from t5x_like.kernels.target import compiling_for


@contextlib.contextmanager
def interpreted(platform: str, **options):
    """Kernels for `platform`, "tpu" or "gpu", run by an interpreter on CPU.

    On "tpu", memory starts as NaN, and the steps along parallel grid dims come in random order. On "cpu" nothing is
    interpreted.
    """
    with contextlib.ExitStack() as stack:
        if platform == "tpu":
            parameters = pltpu.InterpretParams(uninitialized_memory="nan", random_seed=0, **options)
            stack.enter_context(compiling_for("v5e"))
            stack.enter_context(pltpu.force_tpu_interpret_mode(parameters))
        if platform == "gpu":
            stack.enter_context(compiling_for("h100", interpreted=True))
        yield


def export_for(platform: str, chip: str, function, *shapes) -> str:
    """The module that `function` lowers to, for `platform` "tpu" or "cuda"."""
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")] if platform == "cuda" else []
    # Newer versions of JAX ask which GPU it is.
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("_",), abstract_device=gpu))
    with compiling_for(chip), mesh if platform == "cuda" else contextlib.nullcontext():
        run = jax.jit(lambda *arrays: function(*arrays))
        return jax.export.export(run, platforms=[platform], disabled_checks=checks)(*shapes).mlir_module()
