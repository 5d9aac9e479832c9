"""A class for each word of a text, predicted at the word's first token (Devlin et al. 2019, section 5.3)."""

from collections.abc import Sequence

import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.objectives.examples import ExampleObjective, Sizes, first, marked
from t5x_like.data.objectives.objective import Features, Index, Keys, Rows, Transform, token_features
from t5x_like.data.pieces import constant, join
from t5x_like.data.tasks.layouts import ExampleRows, Lengths
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError


@configurable
class Tagging(ExampleObjective):
    """[CLS] words [SEP]: the classes of words, for TokenClassificationHeadConfig; a long text loses its end."""

    field_names = ("words", "classes")

    def features(self, length: int, packed: bool) -> Features:
        names = ("input_tokens", "segment_ids", "positions", "target_classes", "loss_weights")
        return token_features(length, *(f"encoder_{name}" for name in names))

    def sizes(self, lengths: Lengths) -> Sizes:
        return (lengths["words"] + 2,)

    def capacities(self, length: int) -> Sequence[int]:
        return (length,)

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        if length < 3:
            raise UserError(f"DataConfig.sequence_length={length}: a text and its marks need at least 3 tokens.")

        def transform(layout: ExampleRows, index: Index, keys: Keys) -> Rows:
            examples = layout.read(index)
            words, classes = (first(examples.field(name), length - 2) for name in self.field_names)
            text, none = marked(words, tokenizer), constant(words.pieces, 0)
            # One more than the class; 0 where there is none.
            classes = join(join(none, classes), none).values
            pieces = text.pieces
            return {
                "encoder_input_tokens": pieces.pad(text.values, length, tokenizer.pad_id or 0),
                "encoder_segment_ids": pieces.segment_ids(length),
                "encoder_positions": pieces.positions(length),
                "encoder_target_classes": pieces.pad(np.maximum(classes - 1, 0), length),
                "encoder_loss_weights": pieces.pad(classes > 0, length, 0, "float32"),
            }

        return transform
