"""Permutation language models (XLNet): tokens are predicted in a random order, for a plain decoder."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout
from t5x_like.data.objectives.causal import TOKENS
from t5x_like.data.objectives.objective import (
    Draws,
    Features,
    Index,
    Keys,
    Objective,
    Rows,
    Transform,
    order_within,
    token_features,
)
from t5x_like.data.pieces import Ragged, join, select
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError


@configurable
class PermutationLM(Objective):
    """The last tokens of a random order are predicted, each from its place and the tokens before it in that order.

    Yang et al. 2019, sections 2.2 and 2.3. The two streams are tokens of one row: a piece holds its content and, behind
    it, a query ([MASK], at the same position) for each token that is predicted. `decoder_order` is 2 * rank + 1 for
    content and 2 * rank for queries; a token sees those of its own and of lower orders, but none sees a query
    (`decoder_key_mask` 0). So content sees that of its own and of lower ranks, a query that of lower ranks only.

    Attributes:
      prediction_rate: share of the tokens of a piece that are predicted, 1/K of the paper: the last of the order, at
        least one and never all.
    """

    prediction_rate: float = 1 / 6

    def __post_init__(self):
        if not 0 < self.prediction_rate <= 1:
            raise UserError(f"PermutationLM.prediction_rate={self.prediction_rate}: must be more than 0, at most 1.")

    def features(self, length: int, packed: bool) -> Features:
        names = (*TOKENS, "decoder_positions", "decoder_order", "decoder_key_mask")
        return token_features(length, *names, *(("decoder_segment_ids",) if packed else ()))

    def costs(self, lengths: Int64[np.ndarray, "pieces"], length: int) -> Int64[np.ndarray, "pieces"]:
        return lengths + self.num_predicted(lengths)

    def num_predicted(self, lengths: Int64[np.ndarray, "pieces"]) -> Int64[np.ndarray, "pieces"]:
        return np.clip(np.round(lengths * self.prediction_rate).astype(np.int64), 1, lengths - 1)

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        return _Permuted(self, length, packed, tokenizer.pad_id or 0, tokenizer.mask_id)


@dataclasses.dataclass(frozen=True)
class _Permuted:
    config: PermutationLM
    length: int
    packed: bool
    pad: int
    mask: int

    def __call__(self, layout: Layout, index: Index, keys: Keys) -> Rows:
        text = layout.read(index)
        pieces, tokens = text.pieces, text.tokens
        rank = np.empty_like(pieces.position)
        rank[order_within(pieces.of, Draws(pieces, keys).by_token(0))] = pieces.position
        is_predicted = rank >= (pieces.lengths - self.config.num_predicted(pieces.lengths))[pieces.of]

        every = Ragged(pieces, np.arange(len(tokens)))
        streams = join(every, select(every, is_predicted))
        token = streams.values
        is_content = streams.pieces.position < pieces.lengths[streams.pieces.of]
        pad = lambda values, padding=0, dtype="int32": streams.pieces.pad(values, self.length, padding, dtype)
        rows = {
            "decoder_input_tokens": pad(np.where(is_content, tokens[token], self.mask), self.pad),
            "decoder_target_tokens": pad(np.where(is_content, self.pad, tokens[token]), self.pad),
            "decoder_loss_weights": pad(~is_content, 0, "float32"),
            "decoder_positions": pad(pieces.position[token]),
            "decoder_order": pad(2 * rank[token] + is_content),
            "decoder_key_mask": pad(is_content),
        }
        return rows | ({"decoder_segment_ids": streams.pieces.segment_ids(self.length)} if self.packed else {})
