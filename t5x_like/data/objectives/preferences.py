"""Pairs of rows, the preferred answer and the other, for a reward (Ouyang et al. 2022, section 3.5)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout
from t5x_like.data.objectives.examples import ExampleObjective, Sizes, by_row, first, last
from t5x_like.data.objectives.objective import (
    Features,
    Index,
    Keys,
    LayoutName,
    Rows,
    Transform,
    required_eos,
    token_features,
)
from t5x_like.data.pieces import constant, join, select
from t5x_like.data.tasks.examples import ExampleSet
from t5x_like.data.tasks.layouts import Examples, Lengths
from t5x_like.data.tokenizers import Tokenizer


class PairRows(Layout):
    """Two rows per example, which stay neighbours: row 2i has the preferred answer of example i, row 2i + 1 the other.

    Attributes:
      source: The examples.
    """

    rows_together = 2

    def __init__(self, source: ExampleSet, length: int):
        self.source = source
        prompt, chosen, rejected = (source.bounds(name)[1] for name in ("prompt", "chosen", "rejected"))
        wanted = np.stack([prompt + chosen, prompt + rejected]) + 2
        self.num_rows = 2 * source.num_documents
        self.num_tokens = int(np.minimum(wanted, length).sum())
        self.tokens_per_row = self.num_tokens / max(self.num_rows, 1)
        self.num_cut = int((wanted > length).any(axis=0).sum())

    def read(self, index: Index) -> tuple[Examples, Int64[np.ndarray, "pieces"]]:
        """The examples of rows, and which answer each has: 0 or 1; numbers from `num_rows` on have none."""
        rows = np.flatnonzero(index < self.num_rows)
        example, which = np.divmod(index[rows], 2)
        return Examples(self.source, example, rows, len(index)), which


@configurable
class Preferences(ExampleObjective):
    """Rows in pairs, prompt and answer each: the preferred answer, then the other, for RewardHeadConfig.

    Of what is longer than a row, the answer loses its end where it is longer than half of the row, and the prompt its
    beginning. `is_preferred` is 1 in the first row of each pair.
    """

    field_names = ("prompt", "chosen", "rejected")

    def features(self, length: int, packed: bool) -> Features:
        names = ("decoder_input_tokens", "decoder_segment_ids", "decoder_positions")
        return token_features(length, *names) | {"is_preferred": ((), "int32"), "label_weights": ((), "float32")}

    def sizes(self, lengths: Lengths) -> Sizes:
        return (lengths["prompt"] + np.maximum(lengths["chosen"], lengths["rejected"]) + 2,)

    def capacities(self, length: int) -> Sequence[int]:
        return (length,)

    def lay_out(self, source: ExampleSet, length: int, layout: LayoutName) -> Layout:
        return PairRows(source, length)

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        pad, eos = tokenizer.pad_id or 0, required_eos(tokenizer, "Preferences")
        start = eos if tokenizer.bos_id is None else tokenizer.bos_id

        def transform(layout: PairRows, index: Index, keys: Keys) -> Rows:
            examples, which = layout.read(index)
            prompt, chosen, rejected = map(examples.field, self.field_names)
            answer = join(
                select(chosen, (which == 0)[chosen.pieces.of]), select(rejected, (which == 1)[rejected.pieces.of])
            )
            answer = join(answer, constant(answer.pieces, eos))
            room = length - 1
            answer = first(answer, room - np.minimum(prompt.pieces.lengths, room // 2))
            prompt = last(prompt, np.minimum(prompt.pieces.lengths, room - answer.pieces.lengths))
            text = join(constant(prompt.pieces, start), join(prompt, answer))
            pieces = text.pieces
            return {
                "decoder_input_tokens": pieces.pad(text.values, length, pad),
                "decoder_segment_ids": pieces.segment_ids(length),
                "decoder_positions": pieces.positions(length),
                "is_preferred": by_row(pieces, which == 0, "int32"),
                "label_weights": by_row(pieces, np.ones(len(pieces.rows)), "float32"),
            }

        return transform
