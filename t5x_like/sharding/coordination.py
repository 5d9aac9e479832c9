"""What the processes of a run tell each other on the host, through the coordination service: no device is involved.

In a single process everything here returns at once.
"""

import itertools
import os
import sys
import traceback
from typing import NoReturn

import jax

# The service that `jax.distributed.initialize` starts; JAX's public functions for it go through devices, and so wait
# for every step that has been dispatched.
from jax._src import distributed

TIMEOUT_SECONDS = 1200
KEPT_MESSAGES = 64
"""Messages that stay for processes that are late; more than any process can lag behind another."""

_numbers = itertools.count()


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


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with this name; a name serves once."""
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"t5x_like/{name}", TIMEOUT_SECONDS * 1000)


def leave(error: BaseException, code: int = 1) -> NoReturn:
    """Ends this process of several after an error, at once.

    JAX's own farewell would wait for the others, and they for this one; so they learn of it by its missing heartbeat,
    or sooner by their next collective operation.
    """
    traceback.print_exception(error)
    print(f"Process {jax.process_index()} of {jax.process_count()} ends after this error.", file=sys.stderr, flush=True)
    os._exit(code)
