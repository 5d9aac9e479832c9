"""Objectives of a decoder alone that reads from left to right: all tokens are predicted, or those behind a prefix."""

import functools

import numpy as np
from jaxtyping import Int32, Int64

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout
from t5x_like.data.objectives.objective import Draws, Features, Index, Keys, Objective, Rows, Transform, token_features
from t5x_like.data.pieces import Pieces
from t5x_like.data.randomness import below
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError

TOKENS = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
PACKED = ("decoder_segment_ids", "decoder_positions")


@configurable
class CausalLM(Objective):
    """Every token is predicted from those before it."""

    predicts_every_token = True

    def features(self, length: int, packed: bool) -> Features:
        return token_features(length, *TOKENS, *(PACKED if packed else ()))

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        return functools.partial(_causal, length, packed, tokenizer.pad_id or 0)


def _causal(length: int, packed: bool, pad: int, layout: Layout, index: Index, keys: Keys) -> Rows:
    text = layout.read(index)
    return decoder_rows(text.pieces, text.before, text.tokens, length, packed, pad)


def decoder_rows(
    pieces: Pieces,
    inputs: Int32[np.ndarray, "tokens"],
    targets: Int32[np.ndarray, "tokens"],
    length: int,
    packed: bool,
    pad: int,
) -> Rows:
    """Rows in which every target weighs 1."""
    rows = {
        "decoder_input_tokens": pieces.pad(inputs, length, pad),
        "decoder_target_tokens": pieces.pad(targets, length, pad),
        "decoder_loss_weights": pieces.pad(1, length, 0, "float32"),
    }
    if packed:
        rows |= {"decoder_segment_ids": pieces.segment_ids(length), "decoder_positions": pieces.positions(length)}
    return rows


@configurable
class PrefixLM(Objective):
    """A prefix that sees itself in both directions; the tokens behind it are predicted, each from all before it.

    Raffel et al. 2020, section 3.2.1. The inputs of the prefix all have the `decoder_order` 0, those behind it have 1,
    2, ...; a token sees those of its own and of lower orders.

    Attributes:
      mean_suffix_rate: share of the tokens that are predicted, on average: their number is uniform from 1 to twice
        this share of a piece of text.
    """

    mean_suffix_rate: float = 0.5

    def __post_init__(self):
        if not 0 < self.mean_suffix_rate <= 0.5:
            raise UserError(
                f"PrefixLM.mean_suffix_rate={self.mean_suffix_rate}: must be more than 0 and at most 0.5 "
                "(to predict everything, use CausalLM)."
            )

    def features(self, length: int, packed: bool) -> Features:
        return token_features(length, *TOKENS, "decoder_order", *(PACKED if packed else ()))

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        return functools.partial(self._rows, length, packed, tokenizer.pad_id or 0)

    def _rows(self, length: int, packed: bool, pad: int, layout: Layout, index: Index, keys: Keys) -> Rows:
        text = layout.read(index)
        most = np.maximum((2 * self.mean_suffix_rate * text.pieces.lengths).astype(np.int64), 1)
        num_predicted = 1 + below(Draws(text.pieces, keys).by_piece(0), most)
        prefix = text.pieces.lengths - num_predicted + 1
        return prefix_rows(text.pieces, text.before, text.tokens, prefix, length, packed, pad)


def prefix_rows(
    pieces: Pieces,
    inputs: Int32[np.ndarray, "tokens"],
    targets: Int32[np.ndarray, "tokens"],
    prefix: Int64[np.ndarray, "pieces"],
    length: int,
    packed: bool,
    pad: int,
) -> Rows:
    """Rows of pieces whose first `prefix` inputs see each other; the last of these predicts the first target."""
    order = pieces.position - prefix[pieces.of] + 1
    return decoder_rows(pieces, inputs, targets, length, packed, pad) | {
        "decoder_loss_weights": pieces.pad(order >= 0, length, 0, "float32"),
        # Padding comes last: no token sees it.
        "decoder_order": pieces.pad(np.maximum(order, 0), length, padding=length),
    }
