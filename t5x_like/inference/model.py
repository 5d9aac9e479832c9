"""A model with its parameters and its tokenizer: what writes and scores texts."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from t5x_like.data.tokenizers import Tokenizer, encode_marked
from t5x_like.errors import UserError
from t5x_like.inference.generate import PAD_TO, generate, generate_from_inputs
from t5x_like.inference.sampling import Sampling
from t5x_like.models.parameters import GraphDef, Params, merge
from t5x_like.models.token_loss import Batch
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.placement import Placement

ROWS = 8
"""Texts that are scored at once."""


class Score(NamedTuple):
    """How likely a text is.

    Attributes:
      log_likelihood: natural logarithm of its probability.
      num_tokens: that were predicted.
    """

    log_likelihood: float
    num_tokens: int


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to use.

    Attributes:
      config: of the model.
      graphdef: its structure.
      params: its parameters.
      tokenizer: that it was trained with.
      placement: where the parameters are, and how the devices share the work.
      context_length: tokens that it sees at once.
      step: of the checkpoint.
    """

    config: ModelConfig
    graphdef: GraphDef
    params: Params
    tokenizer: Tokenizer
    placement: Placement
    context_length: int
    step: int = 0

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """What the model writes: after each prompt, or, of an encoder-decoder, for each.

        Args:
          prompts: texts, in which special tokens may stand by name; an empty one starts at a document's beginning.
          max_new_tokens: longest continuation.
          temperature: divides the logits; 0: greedy.
          top_k: see `Sampling`.
          top_p: see `Sampling`.
          seed: of the random draws.
        """
        start = [] if self.config.reads_inputs else self._start
        # Characters have no mark for a beginning; their first is the line break in most texts, as good a start as any.
        tokens = [[*start, *encode_marked(self.tokenizer, prompt)] or [0] for prompt in prompts]
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        return self.generate_from_tokens(tokens, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)

    def generate_from_tokens(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> list[str]:
        """As `generate`, for prompts that are tokens."""
        self._check_writes()
        options = {
            "max_new_tokens": max_new_tokens,
            "sampling": sampling,
            "seed": seed,
            "eos_id": self.tokenizer.eos_id,
        }
        with self.placement.use():
            if self.config.reads_inputs:
                new = generate_from_inputs(self.graphdef, self.params, prompts, start_id=self._decoder_start, **options)
            else:
                length = self.context_length
                new = generate(self.graphdef, self.params, prompts, context_length=length, **options)
        return [self.tokenizer.decode(tokens) for tokens in new]

    def score(self, texts: Sequence[str | tuple[str, str]]) -> list[Score]:
        """How likely texts are: from a document's beginning on, or, of pairs (inputs, targets), targets after inputs.

        The end of a text is no part of it. Without a token for a document's beginning, the first token is not scored.

        Args:
          texts: texts or pairs of a decoder, pairs of an encoder-decoder.

        Raises:
          UserError: if a text has nothing to score, or is longer than the model can see.
        """
        self._check_writes()
        rows = [self._row(text) for text in texts]
        scores: list[Score] = []
        for first in range(0, len(rows), ROWS):
            part = rows[first : first + ROWS]
            with self.placement.use():
                sums = _log_likelihoods(self.graphdef, self.params, _batch([*part, *part[:1] * (ROWS - len(part))]))
            scores += [
                Score(float(s), int(np.sum(row.weights))) for row, s in zip(part, np.asarray(sums), strict=False)
            ]
        return scores

    @property
    def _start(self) -> list[int]:
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    @property
    def _decoder_start(self) -> int:
        return self.tokenizer.pad_id or 0

    def _check_writes(self) -> None:
        if not self.config.writes_text:
            kind, head = type(self.config).__name__, type(self.config.head).__name__
            raise UserError(f"{kind} with {head} writes no text: use `evaluate`.")

    def _row(self, text: str | tuple[str, str]) -> "_Row":
        inputs, targets = ("", text) if isinstance(text, str) else text
        inputs, targets = (encode_marked(self.tokenizer, part) for part in (inputs, targets))
        if self.config.reads_inputs:
            if isinstance(text, str):
                raise UserError("An encoder-decoder scores pairs (inputs, targets): give two texts instead of one.")
            row = _Row([self._decoder_start, *targets], [1.0] * len(targets), inputs or [self._decoder_start])
        else:
            row = _Row([*self._start, *inputs, *targets], [0.0] * len([*self._start, *inputs]) + [1.0] * len(targets))
            row = row._replace(weights=row.weights[1:])
        if not sum(row.weights):
            raise UserError(f"{text!r} has no token to score: give a longer text.")
        if max(len(row.tokens) - 1, len(row.inputs)) > self.context_length:
            raise UserError(
                f"A text to score has {max(len(row.tokens) - 1, len(row.inputs)):,} tokens, and the model sees "
                f"{self.context_length:,}: give shorter ones."
            )
        return row


class _Row(NamedTuple):
    """Tokens of which each predicts the next, the weights of those predicted, and an encoder's inputs."""

    tokens: list[int]
    weights: list[float]
    inputs: list[int] = []  # noqa: RUF012


def _batch(rows: Sequence[_Row]) -> Batch:
    """Padded on the right: what stands there is seen by no token of a text."""
    batch = {
        "decoder_input_tokens": _padded([row.tokens[:-1] for row in rows], np.int32),
        "decoder_target_tokens": _padded([row.tokens[1:] for row in rows], np.int32),
        "decoder_loss_weights": _padded([row.weights for row in rows], np.float32),
    }
    if rows[0].inputs:
        batch["encoder_input_tokens"] = _padded([row.inputs for row in rows], np.int32)
        batch["encoder_segment_ids"] = _padded([[1] * len(row.inputs) for row in rows], np.int32)
    return batch


def _padded(rows: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    length = -(-max(map(len, rows)) // PAD_TO) * PAD_TO
    return np.stack([np.pad(np.asarray(row, dtype), (0, length - len(row))) for row in rows])


@functools.partial(jax.jit, static_argnames="graphdef")
def _log_likelihoods(graphdef: GraphDef, params: Params, batch: Batch) -> Float[Array, "batch"]:
    model = merge(graphdef, params)
    x, labels = model.run(batch).x, batch["decoder_target_tokens"]
    likelihoods = model.head.log_likelihoods(x, model.embedding[...], labels)
    return jnp.sum(likelihoods * batch["decoder_loss_weights"], axis=-1)
