"""Text generation with a key-value cache, many prompts at a time."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t5x_like.decoding.cache import Cache, attend_cached, empty_cache
from t5x_like.decoding.sampling import Sampling, sample
from t5x_like.errors import UserError
from t5x_like.models.parameters import GraphDef, Params, merge

NO_TOKEN = -1
"""Ends nothing: no token has this id."""


def generate(
    graphdef: GraphDef,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    context_length: int,
    sampling: Sampling,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[np.ndarray]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    Args:
      graphdef: of the model (see `models.parameters.split`).
      params: its parameters.
      prompts: token ids, at least one each; lengths may differ.
      max_new_tokens: tokens to add.
      context_length: tokens the model sees at once. Where the text outgrows it, the last half is read again and
        generation goes on from there.
      sampling: how tokens are drawn.
      seed: of the random draws; every row of the batch has its own.
      eos_id: a token that ends a text; None: none does.

    Returns:
      The new tokens of each prompt, without the one that ended it.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("A prompt has no tokens: give at least one character.")
    end = NO_TOKEN if eos_id is None else eos_id
    texts = [np.asarray(prompt, np.int32) for prompt in prompts]
    done = np.zeros(len(texts), bool)
    made = 0
    while made < max_new_tokens and not done.all():
        fits = max(map(len, texts)) < context_length
        window = texts if fits else [text[-max(1, context_length // 2) :] for text in texts]
        length = max(map(len, window))
        tokens = np.stack([np.pad(text, (length - len(text), 0)) for text in window])
        start = np.asarray([length - len(text) for text in window], np.int32)
        steps = min(max_new_tokens - made, max(1, context_length - length))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), made), len(texts))
        new = continue_tokens(graphdef, params, tokens, start, keys, done, steps=steps, sampling=sampling, end=end)
        texts = [np.concatenate([text, row]) for text, row in zip(texts, np.asarray(new), strict=True)]
        done |= np.asarray(new == end).any(axis=1)
        made += steps
    return [until(text[len(prompt) :], end) for text, prompt in zip(texts, prompts, strict=True)]


def until(tokens: np.ndarray, end: int) -> np.ndarray:
    """What stands before the first `end`."""
    ends = np.flatnonzero(tokens == end)
    return tokens[: ends[0]] if len(ends) else tokens


class Progress(NamedTuple):
    """What the decoding loop carries: the hidden vectors of the last tokens, and what has been written so far."""

    step: Int[Array, ""]
    hidden: Float[Array, "batch embed"]
    done: Bool[Array, "batch"]
    cache: Cache
    out: Int[Array, "batch steps"]


@partial(jax.jit, static_argnames=("graphdef", "steps", "sampling", "end"))
def continue_tokens(
    graphdef: GraphDef,
    params: Params,
    tokens: Int[Array, "batch length"],
    start: Int[Array, "batch"],
    keys: PRNGKeyArray,
    done: Bool[Array, "batch"],
    *,
    steps: int,
    sampling: Sampling,
    end: int,
) -> Int[Array, "batch steps"]:
    """Reads `tokens` (padded on the left up to `start`) into a cache and draws `steps` more, all `end` from there on.

    Rows that are `done` get `end` only; `keys` holds one key per row.
    """
    model = merge(graphdef, params)
    batch_size, length = tokens.shape

    def read(tokens, index, cache):
        positions = index + jnp.arange(tokens.shape[1], dtype=jnp.int32) - start[:, None]
        attend = attend_cached(index, start, length + steps)
        hidden, cache = model(tokens, positions=jnp.maximum(positions, 0), attend=attend, states=cache)
        return hidden[:, -1], cache

    def advance(p: Progress) -> Progress:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, p.step)
        token = jnp.where(p.done, end, sample(model.logits(p.hidden), step_keys, sampling))
        hidden, cache = read(token[:, None], length + p.step, p.cache)
        return Progress(p.step + 1, hidden, p.done | (token == end), cache, p.out.at[:, p.step].set(token))

    hidden, cache = read(tokens, jnp.int32(0), empty_cache(model.config, batch_size, length + steps))
    out = jnp.full((batch_size, steps), end, jnp.int32)
    state = Progress(jnp.int32(0), hidden, done, cache, out)
    return lax.while_loop(lambda p: (p.step < steps) & ~jnp.all(p.done), advance, state).out
