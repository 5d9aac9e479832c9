"""How every operation chooses its backend: by name, or the first that can and should; said once, with reasons."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from absl import logging

from t5x_like.errors import UserError


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation; all three take the operation's call.

    Attributes:
      run: the implementation.
      refusal: why it cannot do a call, in words that follow "because"; None if it can.
      reserve: why "auto" should not take it for a call that it can do; None if it should.
    """

    run: Callable[[Any], Any]
    refusal: Callable[[Any], str | None] = lambda call: None
    reserve: Callable[[Any], str | None] = lambda call: None


def choose(operation: str, backends: Mapping[str, Backend], backend: str, call: Any) -> Backend:
    """The backend of that name, or for "auto" the first of `backends` that has neither refusal nor reserve.

    Raises:
      UserError: if there is none of that name, or it cannot do the call.
    """
    if backend != "auto" and backend not in backends:
        raise UserError(f"{operation}: there is no backend {backend!r}: choose from auto, {', '.join(backends)}.")
    refusals: dict[str, str | None] = {}
    for name, entry in backends.items():
        refusals[name] = entry.refusal(call)
    able = ", ".join(name for name, refusal in refusals.items() if refusal is None)
    if backend == "auto":
        return _choose_best(operation, backends, call, refusals, able)
    if refusals[backend] is not None:
        raise UserError(f"{operation}: backend {backend!r} cannot, because {refusals[backend]}. Use {able}.")
    log_once(f"{operation}: {backend}, as asked for.")
    return backends[backend]


def _choose_best(operation, backends, call, refusals: dict[str, str | None], able: str) -> Backend:
    against = refusals.copy()
    for name, entry in backends.items():
        against[name] = refusals[name] or entry.reserve(call)
    name = next(filter(lambda name: against[name] is None, backends), None)
    passed_over = "; ".join(f"{other} because {reason}" for other, reason in against.items() if reason is not None)
    if name is None:
        raise UserError(f"{operation}: no backend suits: {passed_over}. Name one that can: {able}.")
    log_once(f"{operation}: {name}, the first backend that can do it. Not: {passed_over or 'none'}.")
    return backends[name]


@functools.cache
def log_once(message: str):
    logging.info(message)
