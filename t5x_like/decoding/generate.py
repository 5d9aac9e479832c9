"""Text generation with a key-value cache, many prompts at a time."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from t5x_like.decoding.cache import Cache, attend_cached, empty_cache
from t5x_like.decoding.sampling import Sampling, sample
from t5x_like.errors import UserError
from t5x_like.models.parameters import GraphDef, Params, merge


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
      seed: the same seed gives the same text, whatever else is in the batch.
      eos_id: a token that ends a text; None: none does.

    Returns:
      The new tokens of each prompt, without the one that ended it.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("A prompt has no tokens: give at least one character.")
    texts = [np.asarray(prompt, np.int32) for prompt in prompts]
    lengths = [len(text) for text in texts]
    done = np.zeros(len(texts), bool)
    made = 0
    while made < max_new_tokens and not done.all():
        keep = max(1, context_length // 2)
        if max(lengths) + made < context_length:
            keep = context_length
        window = [text[-keep:] for text in texts]
        length = max(map(len, window))
        steps = min(max_new_tokens - made, max(1, context_length - length))
        tokens = np.stack([np.pad(text, (length - len(text), 0)) for text in window])
        start = np.asarray([length - len(text) for text in window], np.int32)
        new = continue_tokens(
            graphdef,
            params,
            tokens,
            start,
            jax.random.key(seed),
            made,
            done,
            steps=steps,
            sampling=sampling,
            eos_id=eos_id,
        )
        new = np.asarray(new)
        texts = [np.concatenate([text, row]) for text, row in zip(texts, new, strict=True)]
        done |= (new == eos_id).any(axis=1) if eos_id is not None else False
        made += steps
    new_tokens = [text[length:] for text, length in zip(texts, lengths, strict=True)]
    return [until(tokens, eos_id) for tokens in new_tokens]


def until(tokens: np.ndarray, end: int | None) -> np.ndarray:
    """What stands before the first `end`."""
    ends = np.flatnonzero(tokens == end) if end is not None else ()
    return tokens[: ends[0]] if len(ends) else tokens


class Progress(NamedTuple):
    """What the decoding loop carries."""

    step: Int[Array, ""]
    last: Int[Array, "batch"]
    done: Array
    cache: Cache
    out: Int[Array, "batch steps"]


@partial(jax.jit, static_argnames=("graphdef", "steps", "sampling", "eos_id"))
def continue_tokens(
    graphdef: GraphDef,
    params: Params,
    tokens: Int[Array, "batch length"],
    start: Int[Array, "batch"],
    key: PRNGKeyArray,
    made: Int[Array, ""],
    done: Array,
    *,
    steps: int,
    sampling: Sampling,
    eos_id: int | None,
) -> Int[Array, "batch steps"]:
    """Reads `tokens` (padded on the left up to `start`) into a cache and draws `steps` more, `eos_id` after the end.

    `made` counts the tokens drawn before, so that the random numbers go on from there.
    """
    model = merge(graphdef, params)
    batch_size, length = tokens.shape
    max_length = length + steps

    def next_token(hidden, step):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, made + step), jnp.arange(batch_size))
        return sample(model.logits(hidden[:, -1]), keys, sampling)

    def read(tokens, index, cache):
        positions = index + jnp.arange(tokens.shape[1], dtype=jnp.int32) - start[:, None]
        attend = attend_cached(index, start, max_length)
        return model(tokens, positions=jnp.maximum(positions, 0), attend=attend, states=cache)

    def advance(p: Progress) -> Progress:
        hidden, cache = read(p.last[:, None], length + p.step - 1, p.cache)
        token = next_token(hidden, p.step)
        if eos_id is not None:
            token = jnp.where(p.done, eos_id, token)
        return Progress(p.step + 1, token, p.done | ends(token), cache, p.out.at[:, p.step].set(token))

    def ends(token):
        return token == eos_id if eos_id is not None else jnp.zeros_like(done)

    hidden, cache = read(tokens, jnp.int32(0), empty_cache(model.config, batch_size, max_length))
    first = next_token(hidden, 0)
    if eos_id is not None:
        first = jnp.where(done, eos_id, first)
    fill = 0 if eos_id is None else eos_id
    out = jnp.full((batch_size, steps), fill, jnp.int32).at[:, 0].set(first)
    state = Progress(jnp.int32(1), first, done | ends(first), cache, out)
    state = lax.while_loop(lambda p: (p.step < steps) & ~jnp.all(p.done), advance, state)
    return state.out
