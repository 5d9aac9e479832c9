"""Where the answer to a question stands in a text: the first and the last of its tokens (Devlin et al. 2019, 4.2)."""

import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.layouts import LayoutName
from t5x_like.data.objectives.examples import PairObjective, Sizes, by_row, first
from t5x_like.data.objectives.objective import Features, Index, Keys, Rows, Transform
from t5x_like.data.pieces import select
from t5x_like.data.tasks.examples import ExampleSet
from t5x_like.data.tasks.layouts import Lengths, WindowRows
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError


@configurable
class SpanExtraction(PairObjective):
    """[CLS] question [SEP] context [SEP]: the first and the last token of the answer, for SpanHeadConfig.

    A context that is too long is read in windows that overlap; in those without the answer, and for questions that have
    none, both are [CLS]. Questions are cut to a quarter of the row.

    Attributes:
      stride: Tokens from the start of one window to that of the next.
    """

    stride: int = 128

    number_names = ("span_starts", "span_ends")

    def __post_init__(self):
        if self.stride < 1:
            raise UserError(f"SpanExtraction.stride={self.stride}: must be at least 1.")

    def features(self, length: int, packed: bool) -> Features:
        return super().features(length, packed) | dict.fromkeys(self.number_names, ((), "int32"))

    def lay_out(self, source: ExampleSet, length: int, layout: LayoutName) -> WindowRows:
        return WindowRows(source, length, self.stride)

    def sizes(self, lengths: Lengths) -> Sizes:
        return (lengths["first"] + lengths["second"] + 3,)

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        if length < 8:
            raise UserError(f"DataConfig.sequence_length={length}: a question, a text and their marks need 8 tokens.")

        def transform(layout: WindowRows, index: Index, keys: Keys) -> Rows:
            examples, here = layout.read(index)
            context, starts = examples.field("second"), layout.starts[here]
            question = first(examples.field("first"), layout.questions[here])
            behind = context.pieces.position - starts[context.pieces.of]
            room = length - 3 - layout.questions[here]
            window = select(context, (behind >= 0) & (behind < room[context.pieces.of]))
            begin, end = (examples.number(name) - starts for name in self.number_names)
            is_here = (begin >= 0) & (end < window.pieces.lengths) & (examples.number("span_starts") >= 0)
            place = lambda at: by_row(window.pieces, np.where(is_here, 2 + layout.questions[here] + at, 0), "int32")
            labels = {"span_starts": place(begin), "span_ends": place(end)}
            return self.pair_rows(question, window, tokenizer, length) | labels

        return transform
