"""Objectives of tasks: where the fields of an example stand in a row, and what is predicted of it."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from t5x_like.configurable import configurable
from t5x_like.data.layouts import Layout, LayoutName
from t5x_like.data.objectives.causal import PACKED, TOKENS, decoder_rows
from t5x_like.data.objectives.corruption import encoder_decoder_features, encoder_decoder_rows
from t5x_like.data.objectives.objective import (
    Features,
    Index,
    Keys,
    Objective,
    Rows,
    Transform,
    required_eos,
    token_features,
)
from t5x_like.data.pieces import Pieces, Ragged, constant, join, select
from t5x_like.data.tasks.examples import ExampleSet
from t5x_like.data.tasks.layouts import ExampleRows, Lengths
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError

Sizes = Sequence[Int64[np.ndarray, "examples"]]


class ExampleObjective(Objective):
    """What is predicted of the examples of a task."""

    takes_examples = True

    @abc.abstractmethod
    def sizes(self, lengths: Lengths) -> Sizes:
        """The room that examples want in each of the model's rows, by the lengths of their fields."""

    @abc.abstractmethod
    def capacities(self, length: int) -> Sequence[int]:
        """The room that these rows have."""

    def lay_out(self, source: ExampleSet, length: int, layout: LayoutName) -> Layout:
        return ExampleRows(source, self.sizes, self.capacities(length), packed=layout == "pack")


@configurable
class TextToText(ExampleObjective):
    """An encoder reads the input, a decoder writes the target; both end with eos, and lose their end where too long.

    Attributes:
      target_length: Tokens of a row of the decoder.
    """

    target_length: int = 114

    field_names = ("inputs", "targets")
    packable = True

    def __post_init__(self):
        if self.target_length < 2:
            raise UserError(f"TextToText.target_length={self.target_length}: must be at least 2.")

    def features(self, length: int, packed: bool) -> Features:
        return encoder_decoder_features(length, self.target_length)

    def sizes(self, lengths: Lengths) -> Sizes:
        return lengths["inputs"] + 1, lengths["targets"] + 1

    def capacities(self, length: int) -> Sequence[int]:
        return length, self.target_length

    def answer_length(self, length: int) -> int:
        return self.target_length

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        pad, eos = tokenizer.pad_id or 0, required_eos(tokenizer, "TextToText")

        def transform(layout: ExampleRows, index: Index, keys: Keys) -> Rows:
            examples = layout.read(index)
            ended = lambda text, room: join(text := first(text, room - 1), constant(text.pieces, eos))
            inputs, targets = (
                ended(examples.field("inputs"), length),
                ended(examples.field("targets"), self.target_length),
            )
            return encoder_decoder_rows(inputs, targets, length, self.target_length, pad)

        return transform


@configurable
class AnswerLM(ExampleObjective):
    """A decoder reads the input and writes the target behind it: tokens of the target, and eos, are predicted.

    Of an example that is longer than a row, the target loses its end where it is longer than half of the row, and the
    input its beginning.
    """

    field_names = ("inputs", "targets")
    packable = True

    def features(self, length: int, packed: bool) -> Features:
        return token_features(length, *TOKENS, *(PACKED if packed else ()))

    def sizes(self, lengths: Lengths) -> Sizes:
        return (lengths["inputs"] + lengths["targets"] + 1,)

    def capacities(self, length: int) -> Sequence[int]:
        return (length,)

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        pad, eos = tokenizer.pad_id or 0, required_eos(tokenizer, "AnswerLM")
        start = eos if tokenizer.bos_id is None else tokenizer.bos_id

        def transform(layout: ExampleRows, index: Index, keys: Keys) -> Rows:
            examples = layout.read(index)
            inputs, answers = examples.field("inputs"), examples.field("targets")
            end = constant(answers.pieces, eos)
            targets = join(answers, end)
            learned = Ragged(answers.pieces, np.ones_like(answers.values))
            if "target_weights" in examples.source.streams:
                learned = examples.field("target_weights")
            weights = join(learned, constant(learned.pieces, 1))
            room = length - np.minimum(inputs.pieces.lengths, length // 2)
            targets, weights = first(targets, room), first(weights, room)
            inputs = last(inputs, length - targets.pieces.lengths)
            whole = join(inputs, targets)
            weights = join(Ragged(inputs.pieces, np.zeros_like(inputs.values)), weights)
            rows = decoder_rows(whole.pieces, whole.shifted(start), whole.values, length, packed, pad)
            return rows | {"decoder_loss_weights": whole.pieces.pad(weights.values, length, 0, "float32")}

        return transform


class PairObjective(ExampleObjective):
    """[CLS] first [SEP] second [SEP]; the second with its [SEP] is missing where it has no text."""

    field_names = ("first", "second")

    def features(self, length: int, packed: bool) -> Features:
        names = ("encoder_input_tokens", "encoder_segment_ids", "encoder_positions", "encoder_token_types")
        return token_features(length, *names) | {"label_weights": ((), "float32")}

    def sizes(self, lengths: Lengths) -> Sizes:
        return (lengths["first"] + lengths["second"] + 2 + (lengths["second"] > 0),)

    def capacities(self, length: int) -> Sequence[int]:
        return (length,)

    def pair_rows(self, first_text: Ragged, second_text: Ragged, tokenizer: Tokenizer, length: int) -> Rows:
        """Rows of one example each, which must fit."""
        head = marked(first_text, tokenizer)
        tail = Ragged(second_text.pieces, second_text.values)
        marks = select(constant(tail.pieces, tokenizer.sep_id), tail.pieces.lengths > 0)
        whole = join(head, join(tail, marks))
        pieces = whole.pieces
        is_second = pieces.position >= head.pieces.lengths[pieces.of]
        return {
            "encoder_input_tokens": pieces.pad(whole.values, length, tokenizer.pad_id or 0),
            "encoder_segment_ids": pieces.segment_ids(length),
            "encoder_positions": pieces.positions(length),
            "encoder_token_types": pieces.pad(is_second, length),
            "label_weights": by_row(pieces, np.ones(len(pieces.rows)), "float32"),
        }


def marked(text: Ragged, tokenizer: Tokenizer) -> Ragged:
    return join(join(constant(text.pieces, tokenizer.cls_id), text), constant(text.pieces, tokenizer.sep_id))


class _LabelObjective(PairObjective):
    """A label for a row; of two texts that are too long together the longer one loses its end."""

    def features(self, length: int, packed: bool) -> Features:
        (name,), kind = self.number_names, "int32" if self.number_names == ("labels",) else "float32"
        return super().features(length, packed) | {name: ((), kind)}

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        (name,) = self.number_names
        if length < 4:
            raise UserError(f"DataConfig.sequence_length={length}: two texts and their marks need more than 4 tokens.")

        def transform(layout: ExampleRows, index: Index, keys: Keys) -> Rows:
            examples = layout.read(index)
            one, two = examples.field("first"), examples.field("second")
            room = length - 2 - (two.pieces.lengths > 0)
            of_one = np.minimum(one.pieces.lengths, np.maximum(room - two.pieces.lengths, (room + 1) // 2))
            rows = self.pair_rows(first(one, of_one), first(two, room - of_one), tokenizer, length)
            kind = self.features(length, packed)[name][1]
            return rows | {name: by_row(one.pieces, examples.number(name), kind)}

        return transform


@configurable
class Classification(_LabelObjective):
    """The class of a text, or of two, for SequenceClassificationHeadConfig."""

    number_names = ("labels",)


@configurable
class Regression(_LabelObjective):
    """A number for a text, or for two, for RegressionHeadConfig."""

    number_names = ("targets",)


def by_row(pieces: Pieces, values: np.ndarray, dtype: str) -> Float32[np.ndarray, "rows"]:
    """One value for each row of one piece; 0 for rows without one."""
    out = np.zeros(pieces.num_rows, dtype)
    out[pieces.rows] = values
    return out


def first(text: Ragged, room: Int64[np.ndarray, "pieces"] | int) -> Ragged:
    """The first so many tokens of each piece."""
    room = np.broadcast_to(room, text.pieces.lengths.shape)
    return select(text, text.pieces.position < room[text.pieces.of])


def last(text: Ragged, room: Int64[np.ndarray, "pieces"]) -> Ragged:
    """The last so many tokens of each piece."""
    pieces = text.pieces
    return select(text, pieces.position >= (pieces.lengths - room)[pieces.of])
