"""How Orbax is used: its options, what it is given, and what it may say."""

import logging

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp


def snapshot(state: PyTree) -> PyTree:
    """Arrays that may be written at leisure, whatever the next step does with the state's buffers."""
    if jax.default_backend() != "cpu":
        return state  # Orbax copies them to host memory before it returns.
    # On CPU it writes from the buffers themselves: a step that donates them would wait until they are written.
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state)


def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without one, Orbax would ask for the devices that the checkpoint was saved from.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def orbax_options() -> ocp.Context:
    options = ocp.Context()
    # Weights hardly compress (8 %), at twice the processor time per save.
    options.array.saving.use_compression = False
    # Orbax's threads wait for a directory that the background cannot make: the process would hang at exit.
    options.asynchronous.create_directories_asynchronously = False
    # What was asked for has been compared with what was saved by name before.
    options.pytree.loading.partial_load = True
    return options


def no_orbax_chatter(record: logging.LogRecord) -> bool:
    """Drops Orbax's progress notes, and the tracebacks that its threads log of errors that we report."""
    from_orbax = "/orbax/checkpoint/" in record.pathname
    return not from_orbax or (record.levelno >= logging.WARNING and record.filename != "future.py")
