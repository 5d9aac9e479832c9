"""Masked language models: an encoder predicts tokens that are hidden from it (BERT), and whether two texts belong."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from t5x_like.configurable import configurable
from t5x_like.data.layouts import DocumentRows, Layout, Text
from t5x_like.data.objectives.objective import Draws, Features, Index, Keys, Objective, Rows, Transform, token_features
from t5x_like.data.objectives.words import Edges, text_ids
from t5x_like.data.pieces import Ragged, constant, join
from t5x_like.data.randomness import below, uniform
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError

TOKENS = ("encoder_input_tokens", "encoder_target_tokens", "encoder_loss_weights")
PLACES = ("encoder_segment_ids", "encoder_positions")


@configurable
class MaskedLM(Objective):
    """Tokens chosen at random are predicted from all others (Devlin et al. 2019, section 3.1).

    A piece of text is [CLS] text [SEP], or [CLS] text [SEP] text [SEP]. Of the tokens chosen some become [MASK], some
    another token, and some stay; special tokens, and those between documents, are never chosen.

    Attributes:
      mask_rate: share of the tokens that are chosen, each by itself.
      keep_rate: share of those chosen that stay as they are.
      replace_rate: share of those chosen that become a random token; the others become [MASK].
      whole_words: chooses words instead of tokens: all tokens of a word, or none.
      pairs: `none`; `next`: a row has two texts, and half of the time the second is of another document
        (`pair_labels` 1; next sentence prediction); `order`: half of the time two texts that follow each other change
        places (`pair_labels` 1; Lan et al. 2020, section 3.1). Pairs need DataConfig.layout = 'documents'.
    """

    mask_rate: float = 0.15
    keep_rate: float = 0.1
    replace_rate: float = 0.1
    whole_words: bool = False
    pairs: Literal["none", "next", "order"] = "none"

    def __post_init__(self):
        for field in ("mask_rate", "keep_rate", "replace_rate"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"MaskedLM.{field}={getattr(self, field)}: must be from 0 to 1.")
        if not self.mask_rate:
            raise UserError("MaskedLM.mask_rate=0: nothing would be predicted.")
        if self.keep_rate + self.replace_rate > 1:
            raise UserError(
                f"MaskedLM.keep_rate={self.keep_rate} and replace_rate={self.replace_rate} are more than 1 together."
            )

    @property
    def needs_documents(self) -> bool:
        return self.pairs != "none"

    @property
    def needs_other_documents(self) -> bool:
        return self.pairs == "next"

    def features(self, length: int, packed: bool) -> Features:
        features = token_features(length, *TOKENS, *PLACES)
        if self.pairs != "none":
            features |= token_features(length, "encoder_token_types")
            features |= {"pair_labels": ((), "int32"), "pair_weights": ((), "float32")}
        return features

    def costs(self, lengths: Int64[np.ndarray, "pieces"], length: int) -> Int64[np.ndarray, "pieces"]:
        return lengths + (2 if self.pairs == "none" else 3)

    def build(self, tokenizer: Tokenizer, length: int, packed: bool) -> Transform:
        never = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.special_ids.values())
        maskable = np.ones(tokenizer.vocab_size, bool)
        maskable[[token for token in never if token is not None]] = False
        return _Masked(
            config=self,
            length=length,
            pad=tokenizer.pad_id or 0,
            mask=tokenizer.mask_id,
            cls=tokenizer.cls_id,
            sep=tokenizer.sep_id,
            maskable=maskable,
            text_ids=text_ids(tokenizer),
            edges=Edges(tokenizer),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Masked:
    """The transform; `maskable` is a table by token."""

    config: MaskedLM
    length: int
    pad: int
    mask: int
    cls: int
    sep: int
    maskable: Bool[np.ndarray, "vocabulary"]
    text_ids: Int32[np.ndarray, "ids"]
    edges: Edges

    def __call__(self, layout: Layout, index: Index, keys: Keys) -> Rows:
        text = layout.read(index)
        begin, end = constant(text.pieces, self.cls), constant(text.pieces, self.sep)
        if self.config.pairs == "none":
            return self._hide(join(join(begin, Ragged(text.pieces, text.tokens)), end), keys)
        first, second, labels = self._pairs(text, layout, index, keys)
        first = join(join(begin, Ragged(first.pieces, first.tokens)), end)
        second = join(Ragged(second.pieces, second.tokens), end)
        whole = join(first, second)
        is_second = whole.pieces.position >= first.pieces.lengths[whole.pieces.of]
        both = (first.pieces.lengths > 2) & (second.pieces.lengths > 1)
        by_row = lambda values, dtype: begin.pieces.pad(values, 1, 0, dtype)[:, 0]
        return self._hide(whole, keys) | {
            "encoder_token_types": whole.pieces.pad(is_second, self.length),
            "pair_labels": by_row(labels & both, "int32"),
            "pair_weights": by_row(both, "float32"),
        }

    def _hide(self, text: Ragged, keys: Keys) -> Rows:
        pieces, tokens = text.pieces, text.values
        draws = Draws(pieces, keys)
        maskable, bits = self.maskable[tokens], draws.by_token(0)
        if self.config.whole_words:
            # The bits of its first token decide on a word.
            begins = self.edges.begin_words(tokens, (pieces.position == 0) | ~maskable)
            bits = bits[np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))]
        is_chosen = maskable & (uniform(bits) < self.config.mask_rate)
        chosen = np.flatnonzero(is_chosen)
        fate = uniform(draws.by_token(1, chosen))
        is_random = fate < self.config.replace_rate
        is_masked = fate >= self.config.replace_rate + self.config.keep_rate
        inputs = tokens.copy()
        inputs[chosen[is_masked]] = self.mask
        random = below(draws.by_token(2, chosen[is_random]), len(self.text_ids))
        inputs[chosen[is_random]] = self.text_ids[random]
        return {
            "encoder_input_tokens": pieces.pad(inputs, self.length, self.pad),
            "encoder_target_tokens": pieces.pad(tokens, self.length, self.pad),
            "encoder_loss_weights": pieces.pad(is_chosen, self.length, 0, "float32"),
            "encoder_segment_ids": pieces.segment_ids(self.length),
            "encoder_positions": pieces.positions(self.length),
        }

    def _pairs(
        self, text: Text, layout: DocumentRows, index: Index, keys: Keys
    ) -> tuple[Text, Text, Bool[np.ndarray, "pieces"]]:
        """The first and the second text of each piece, and whether they are no pair (or in the wrong order)."""
        draws = Draws(text.pieces, keys)
        label = draws.by_piece(3) % np.uint64(2) == 1
        cut = self._cuts(text, draws.by_token(4))
        first = text.part(text.starts, cut)
        second = text.part(text.starts + cut, text.pieces.lengths - cut)
        if self.config.pairs == "order":
            return _either(label, second, first), _either(label, first, second), label
        rows = text.pieces.rows
        other = layout.read(layout.elsewhere(index[rows], draws.by_piece(5)))
        skipped = self._cuts(other, Draws(other.pieces, keys[rows]).by_token(6))
        # No longer than the text that it stands for, so that lengths tell little.
        length = np.minimum(other.pieces.lengths - skipped, second.pieces.lengths)
        return first, _either(label, text.part(other.starts + skipped, length), second), label

    def _cuts(self, text: Text, bits: UInt64[np.ndarray, "tokens"]) -> Int64[np.ndarray, "pieces"]:
        """Where to cut each piece in two: behind a random sentence, or in the middle where it has but one."""
        pieces = text.pieces
        cut = pieces.lengths // 2
        is_end = self.edges.end_sentences(text.tokens) & (pieces.position < (pieces.lengths - 1)[pieces.of])
        bits = np.where(is_end, bits, np.uint64(0))
        largest = np.maximum.reduceat(bits, pieces.begins)
        chosen = np.flatnonzero(is_end & (bits == largest[pieces.of]))
        cut[pieces.of[chosen]] = pieces.position[chosen] + 1
        return cut


def _either(condition: Bool[np.ndarray, "pieces"], yes: Text, no: Text) -> Text:
    lengths = np.where(condition, yes.pieces.lengths, no.pieces.lengths)
    return yes.part(np.where(condition, yes.starts, no.starts), lengths)
