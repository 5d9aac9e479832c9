"""What all objectives are: how much text has room in a row, the features, and the transform of rows of text."""

import abc
import bisect
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from t5x_like.data.layouts import DocumentRows, Layout, LayoutName, PackedRows, Windows
from t5x_like.data.pieces import Pieces
from t5x_like.data.randomness import random_bits
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError

Rows = dict[str, Shaped[np.ndarray, "rows ..."]]
"""Features of a batch, by T5X's names: `..._tokens`, `..._segment_ids` (0: padding), `..._positions` and the like are
int32, `..._weights` float32."""

Features = dict[str, tuple[tuple[int, ...], str]]
"""Shape of one row and dtype, by feature."""

Index = Int64[np.ndarray, "rows"]
Keys = UInt64[np.ndarray, "rows"]

Transform = Callable[[Layout, Index, Keys], Rows]
"""(layout, row numbers, a random key for each) -> features. A row depends on its own number and key alone."""


class Objective(abc.ABC):
    """What is predicted from what; `length` is DataConfig.sequence_length.

    A row holds one piece of text, or several that do not see each other (`packed`).

    Attributes:
      needs_documents: A row must not mix documents.
      needs_other_documents: A row takes text of other documents too: there must be two or more.
      predicts_every_token: Every token of the text is predicted, so that losses per byte compare.
      takes_examples: It takes the examples of tasks, not text.
      field_names: The fields that an example must have.
      number_names: The numbers that it must have.
      packable: Whether several examples may share a row.
    """

    needs_documents: bool = False
    needs_other_documents: bool = False
    predicts_every_token: bool = False
    takes_examples: bool = False
    field_names: tuple[str, ...] = ()
    number_names: tuple[str, ...] = ()
    packable: bool = False

    @abc.abstractmethod
    def features(self, length: int, packed: bool) -> Features:
        """Shapes and dtypes of the features."""

    def costs(self, lengths: Int64[np.ndarray, "pieces"], length: int) -> Int64[np.ndarray, "pieces"]:
        """The room in a row that pieces of so many tokens take; it does not shrink where pieces grow."""
        return lengths

    @abc.abstractmethod
    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        """The transform that makes these features.

        Raises:
          UserError: if the tokenizer lacks a token that it needs.
        """

    def lay_out(self, source: Any, length: int, layout: LayoutName) -> Layout:
        """Rows that hold every token of a split, or every example, once."""
        text_length = self.text_length(length)
        match layout:
            case "pack":
                return PackedRows(source, text_length, lambda lengths: self.costs(lengths, length), length)
            case "documents":
                return DocumentRows(source, text_length)
        return Windows(source, text_length)

    def answer_length(self, length: int) -> int:
        """Tokens of the longest answer that a model learns to write."""
        return length // 2

    def text_length(self, length: int) -> int:
        """Tokens of the longest piece of text that has room in a row.

        Raises:
          UserError: if there is no room for any.
        """
        return self.longest(lambda tokens: int(self.costs(np.array([tokens]), length)[0]), length)

    def longest(self, cost: Callable[[int], int], length: int) -> int:
        """The largest number of tokens that costs at most `length`."""
        tokens = bisect.bisect_right(range(1, 1000 * length), length, key=cost)
        if not tokens:
            raise UserError(
                f"DataConfig.sequence_length={length} has no room for text beside the special tokens of "
                f"{type(self).__name__}: it must be at least {cost(1)}."
            )
        return tokens


class Draws:
    """Random bits by piece and by token of a piece; `number` tells the draws of one batch apart."""

    def __init__(self, pieces: Pieces, keys: Keys):
        self._pieces = pieces
        self._keys = random_bits(keys[pieces.rows], pieces.number.astype(np.uint64))

    def by_piece(self, number: int) -> UInt64[np.ndarray, "pieces"]:
        return random_bits(self._keys, np.array([number << 32], np.uint64))

    def by_token(
        self, number: int, chosen: Int64[np.ndarray, "tokens"] | slice = slice(None)
    ) -> UInt64[np.ndarray, "tokens"]:
        """The bits of all tokens, or of those at the places `chosen`."""
        place = self._pieces.position[chosen].astype(np.uint64) + np.uint64((number << 32) + 1)
        return random_bits(self._keys[self._pieces.of[chosen]], place)


def order_within(groups: Int64[np.ndarray, "n"], bits: UInt64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """The indices that sort by group (ascending already, fewer than 2^24 of them), and by bits within a group."""
    # Equal bits keep their order, so that every machine has the same one.
    return np.argsort((groups.astype(np.uint64) << np.uint64(40)) | (bits >> np.uint64(24)), kind="stable")


def token_features(length: int, *names: str) -> Features:
    """Features of one value per token: float32 for weights, int32 for any other."""
    return {name: ((length,), "float32" if name.endswith("weights") else "int32") for name in names}


def required_eos(tokenizer: Tokenizer, objective: str) -> int:
    """UserError without an eos."""
    if tokenizer.eos_id is None:
        raise UserError(
            f"{objective} ends sequences with the end of a document, which this tokenizer lacks: use another."
        )
    return tokenizer.eos_id
