"""Text generation with a key-value cache, many prompts at a time."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t5x_like.errors import UserError
from t5x_like.inference.cache import attend_cached, empty_states
from t5x_like.inference.sampling import Sampling, sample
from t5x_like.models.context import Encoded, TokenInfo
from t5x_like.models.parameters import GraphDef, Params, merge
from t5x_like.models.stack import States

PAD_TO = 32
"""Prompts are padded to a multiple of so many tokens: batches of different lengths share compiled programs."""

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
        longest = max(map(len, window))
        length = _rounded(longest)
        tokens = np.stack([np.pad(text, (length - len(text), 0)) for text in window])
        start = np.asarray([length - len(text) for text in window], np.int32)
        steps = min(max_new_tokens - made, max(1, context_length - longest))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), made), len(texts))
        new = continue_tokens(graphdef, params, tokens, start, keys, done, steps=steps, sampling=sampling, end=end)
        texts = [np.concatenate([text, row]) for text, row in zip(texts, np.asarray(new), strict=True)]
        done |= np.asarray(new == end).any(axis=1)
        made += steps
    return [until(text[len(prompt) :], end) for text, prompt in zip(texts, prompts, strict=True)]


def _rounded(length: int) -> int:
    return -(-length // PAD_TO) * PAD_TO


def until(tokens: np.ndarray, end: int) -> np.ndarray:
    """What stands before the first `end`."""
    ends = np.flatnonzero(tokens == end)
    return tokens[: ends[0]] if len(ends) else tokens


def generate_from_inputs(
    graphdef: GraphDef,
    params: Params,
    inputs: Sequence[Sequence[int]],
    *,
    start_id: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[np.ndarray]:
    """What an encoder-decoder writes for each of the encoder's inputs.

    Args:
      graphdef: of the model.
      params: its parameters.
      inputs: token ids, at least one each; lengths may differ.
      start_id: the token that the decoder begins with.
      max_new_tokens: longest output.
      sampling: how tokens are drawn.
      seed: of the random draws.
      eos_id: a token that ends a text; None: none does.

    Returns:
      The tokens of each output, without the one that ended it.
    """
    if any(len(tokens) == 0 for tokens in inputs):
        raise UserError("A prompt has no tokens: give at least one character.")
    end = NO_TOKEN if eos_id is None else eos_id
    count, length = len(inputs), _rounded(max(map(len, inputs)))
    padded = np.stack([np.pad(np.asarray(tokens, np.int32), (0, length - len(tokens))) for tokens in inputs])
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), padded.shape)
    is_input = positions < np.asarray([len(tokens) for tokens in inputs])[:, None]
    new = continue_tokens(
        graphdef,
        params,
        np.full((count, 1), start_id, np.int32),
        np.zeros(count, np.int32),
        jax.random.split(jax.random.key(seed), count),
        np.zeros(count, bool),
        steps=max_new_tokens,
        sampling=sampling,
        end=end,
        inputs=TokenInfo(positions, padded, is_input.astype(np.int32)),
    )
    return [until(row, end) for row in np.asarray(new)]


class Progress(NamedTuple):
    """What the decoding loop carries: the hidden vectors of the last tokens, and what has been written so far."""

    step: Int[Array, ""]
    hidden: Float[Array, "batch embed"]
    done: Bool[Array, "batch"]
    states: States
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
    inputs: TokenInfo | None = None,
) -> Int[Array, "batch steps"]:
    """Reads `tokens` (padded on the left up to `start`) into a cache and draws `steps` more, all `end` from there on.

    Rows that are `done` get `end` only; `keys` holds one key per row. `inputs` are an encoder's tokens; without
    them the model is a decoder.
    """
    model = merge(graphdef, params)
    (batch_size, length), config = tokens.shape, model.config

    def read(tokens, index, states, encoded):
        """The last hidden vectors and the states; `encoded` is the encoder's output, needed the first time."""
        place = index + jnp.arange(tokens.shape[1], dtype=jnp.int32) - start[:, None]
        tokens = TokenInfo(jnp.maximum(place, 0), tokens, (place >= 0).astype(jnp.int32))
        given = None if inputs is None else Encoded(encoded, inputs.segment_ids)
        out = model(tokens, given, attend=attend_cached(index, start, length + steps), states=states)
        return out.x[:, -1], out.states

    def advance(p: Progress) -> Progress:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, p.step)
        scores = model.head.scores(p.hidden, model.embedding[...])
        token = jnp.where(p.done, end, sample(scores, step_keys, sampling))
        hidden, states = read(token[:, None], length + p.step, p.states, None)
        return Progress(p.step + 1, hidden, p.done | (token == end), states, p.out.at[:, p.step].set(token))

    encoded = None if inputs is None else model(inputs, name="encoder").x
    stack = list(config.stacks.values())[-1]
    states = empty_states(stack, config.d_model, config.dtype, batch_size, length + steps)
    hidden, states = read(tokens, jnp.int32(0), states, encoded)
    out = jnp.full((batch_size, steps), end, jnp.int32)
    state = Progress(jnp.int32(0), hidden, done, states, out)
    return lax.while_loop(lambda p: (p.step < steps) & ~jnp.all(p.done), advance, state).out
