"""What the processes of a run tell each other on the host, through the coordination service: no device is involved.

In a single process everything here returns at once.
"""

import atexit
import itertools
import os
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax

# The service that `jax.distributed.initialize` starts; JAX's public functions for it go through devices, and so wait
# for every step that has been dispatched.
from jax._src import distributed

from t5x_like.errors import UserError

TIMEOUT_SECONDS = 1200
LISTENING_SECONDS = 1
FAREWELL_SECONDS = 2
FAILURE = "t5x_like/failure"
"""Where the exit code of the first process that fails is told."""

KEPT_MESSAGES = 64
"""Messages that stay for processes that are late; more than any process can lag behind another."""

_numbers = itertools.count()
_leaving = threading.Event()
"""Set when this process ends of its own accord, well or not."""


def from_first_process(text: str) -> str:
    """Returns process 0's `text` in every process; each calls it equally often, from one thread."""
    if jax.process_count() == 1:
        return text
    client, number = distributed.global_state.client, next(_numbers)
    if jax.process_index() != 0:
        return client.blocking_key_value_get(f"t5x_like/{number}", TIMEOUT_SECONDS * 1000)
    client.key_value_set(f"t5x_like/{number}", text)
    if number >= KEPT_MESSAGES:
        client.key_value_delete(f"t5x_like/{number - KEPT_MESSAGES}")
    return text


def wait_for_all(name: str, hours: float = TIMEOUT_SECONDS / 3600) -> None:
    """Returns when every process has called it with this name; a name serves once."""
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"t5x_like/{name}", round(hours * 3600 * 1000))


def exit_when_another_fails() -> None:
    """From now on, this process ends as soon as another one has told why it does (see `leave`)."""
    listener = threading.Thread(target=_listen, daemon=True, name="failures")
    listener.start()

    def stop() -> None:
        _leaving.set()
        listener.join()

    # A thread that waits within JAX's client when the interpreter goes away would end the process by a signal.
    atexit.register(stop)


def _listen() -> None:
    client = distributed.global_state.client
    while not _leaving.is_set():
        try:
            code = client.blocking_key_value_get(FAILURE, LISTENING_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # the service has ended
        if not _leaving.is_set():
            _exit(int(code))


def leave(error: BaseException, code: int = 1) -> NoReturn:
    """Ends this process of several after an error, at once.

    JAX's own farewell would wait for the others, and they for this one. The first that leaves says why, and the others
    end with it, silently: what they would say only follows from that.
    """
    _leaving.set()
    try:
        distributed.global_state.client.key_value_set(FAILURE, str(code))
    except jax.errors.JaxRuntimeError as failure:
        if "ALREADY_EXISTS" in str(failure):
            _exit(code)
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        place = f"Process {jax.process_index()} of {jax.process_count()}"
        print(f"{place} ends after this error, and the others with it.", file=sys.stderr)
    _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(FAREWELL_SECONDS)  # the others listen to a service in this process
    os._exit(code)
