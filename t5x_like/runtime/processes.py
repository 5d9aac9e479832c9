"""Several processes of one run: how they find each other, and which of them does what."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from t5x_like.configurable import difference
from t5x_like.errors import UserError
from t5x_like.runtime.coordination import exit_when_another_fails, from_first_process, wait_for_all


class Meeting(NamedTuple):
    """Where and how the processes of a run find each other.

    Attributes:
      coordinator_address: HOST:PORT of process 0; None: from the environment or the cluster.
      num_processes: how many there are; None likewise.
      process_id: which of them this is, from 0; None likewise.
      start_seconds: how long each waits for the others at the start.
      heartbeat_seconds: how long a process may be silent before the others take it for dead.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_seconds: int = 300
    heartbeat_seconds: int = 100


def join(meeting: Meeting) -> None:
    """Joins the other processes of the run, if there are any; comes before any use of a device.

    What `meeting` leaves open is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where
    nothing is said at all, a Slurm step of several tasks and the hosts of a TPU find each other by themselves.

    Raises:
      UserError: if what is said is incomplete or impossible, or the others do not come in time.
    """
    meeting = _completed(meeting)
    known = meeting.coordinator_address is not None
    if jax.distributed.is_initialized() or meeting.num_processes == 1 or not (known or _in_cluster()):
        return
    try:
        jax.distributed.initialize(
            meeting.coordinator_address,
            meeting.num_processes,
            meeting.process_id,
            cluster_detection_method="deactivate" if known else None,
            initialization_timeout=meeting.start_seconds,
            heartbeat_timeout_seconds=meeting.heartbeat_seconds,
            shutdown_timeout_seconds=meeting.heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        where = meeting.coordinator_address or "the cluster"
        raise UserError(
            f"The processes of the run did not come together at {where} within {meeting.start_seconds} seconds "
            f"({str(error).splitlines()[0]}): start all of them, with the same --coordinator_address."
        ) from error
    if jax.process_index() != 0:
        logging.set_verbosity(logging.WARNING)
    if jax.process_count() > 1:
        exit_when_another_fails()


def _completed(meeting: Meeting) -> Meeting:
    """The meeting with what the environment says of it."""
    names = ("coordinator_address", "num_processes", "process_id")
    given = {}
    for name in names:
        variable = f"JAX_{name.upper()}"
        value = getattr(meeting, name)
        value = os.environ.get(variable) if value is None else value
        if value is not None and name != "coordinator_address" and not str(value).isdecimal():
            raise UserError(f"{variable} is {value!r}: give a number.")
        given[name] = value if value is None or name == "coordinator_address" else int(value)
    missing = [f"--{name}" for name in names if given[name] is None]
    if missing and len(missing) < len(names):
        raise UserError(f"{', '.join(missing)} missing: give all of coordinator_address, num_processes and process_id.")
    if not missing and not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(
            f"--process_id is {given['process_id']} of --num_processes={given['num_processes']}: "
            f"give 0 to {given['num_processes'] - 1}."
        )
    return meeting._replace(**given)


def _in_cluster() -> bool:
    """Whether JAX will find other processes by itself; where it would find none, asking costs seconds."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    if (jax.config.jax_platforms or "tpu").split(",")[0] != "tpu":
        return False
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or int(os.environ.get("MEGASCALE_NUM_SLICES", 1)) > 1
    has_tpu = importlib.util.find_spec("libtpu") is not None and any(
        any(Path("/dev").glob(pattern)) for pattern in ("accel*", "vfio/[0-9]*")
    )
    return pod or has_tpu


def is_first() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_ahead(name: str) -> Iterator[None]:
    """Lets process 0 through alone; the others follow when it has left the block. A name serves once."""
    if is_first():
        yield
    # If process 0 fails, the others end with it, here.
    wait_for_all(name, hours=24)
    if not is_first():
        yield


def check_agreement(configuration: Mapping[str, Any]) -> None:
    """Compares what this process was started with to what process 0 was.

    Args:
      configuration: nested dicts, see `configurable.to_dict`.

    Raises:
      UserError: naming the fields that differ.
    """
    device = jax.local_devices()[0]
    mine = {**configuration, "jax": jax.__version__, "device": device.device_kind}
    lines = difference(json.loads(from_first_process(json.dumps(mine))), json.loads(json.dumps(mine)))
    if lines:
        raise UserError(
            f"Process {jax.process_index()} was started with another configuration than process 0:\n  "
            + "\n  ".join(lines)
            + "\nStart all processes with the same command."
        )
    wait_for_all("agreement")  # so that nothing is begun where one refuses
