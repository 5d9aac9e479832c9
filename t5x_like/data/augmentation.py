"""Noise on what a model reads in training, beside what its objective does: targets stay as they are.

An augmentation is a function of a row's own tokens and key, so batches stay functions of (seed, step): what a host
reads, and when, changes nothing. Validation is never augmented.
"""

import abc
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt64

from t5x_like.configurable import configurable
from t5x_like.data.objectives.objective import Features, Index, Keys, Rows, Transform
from t5x_like.data.objectives.words import text_ids
from t5x_like.data.randomness import below, random_bits, uniform
from t5x_like.data.subwords import SentencePieceTokenizer
from t5x_like.data.tokenizers import ExtendedTokenizer, Tokenizer
from t5x_like.errors import UserError

Augment = Callable[[Rows, Keys], Rows]


class Augmentation(abc.ABC):
    """What every augmentation's configuration can do; one of your own is a subclass in a module named by --plugin.

    Back-translation, for example: look up, or make, another wording of the tokens of a row, and give it in their place.
    """

    @abc.abstractmethod
    def build(self, tokenizer: Tokenizer, features: Features) -> Augment:
        """The function (features of rows, a random key for each row) -> features; UserError if it cannot be.

        Keys are those of the objective: draw with counters of your own, from 2^48 on.
        """


def augmented(transform: Transform, augmentations: list[Augment]) -> Transform:
    """The transform with these behind it, in their order."""

    def apply(layout, index: Index, keys: Keys) -> Rows:
        rows = transform(layout, index, keys)
        for number, augment in enumerate(augmentations):
            rows = augment(rows, random_bits(keys, np.array([(1 << 49) + number], np.uint64)))
        return rows

    return apply


def input_side(features: Features, augmentation: str, moves: bool) -> str:
    """The side whose inputs are noised: the encoder's, or the decoder's where it is alone.

    UserError for noise that `moves` tokens where each stands above its target.
    """
    side = "encoder" if "encoder_input_tokens" in features else "decoder"
    fixed = {f"{side}_target_tokens", "span_starts"} & features.keys()
    if moves and fixed:
        raise UserError(
            f"{augmentation} moves tokens, but {' and '.join(sorted(fixed))} say where they stand: only masking and "
            "replacement fit this objective."
        )
    return side


@configurable
class TokenNoise(Augmentation):
    """Inputs lose, change and swap tokens at random; special tokens stay.

    Attributes:
      mask_rate: Share of the tokens that become [MASK], each by itself.
      replace_rate: Share of the others that become a random token.
      drop_rate: Share of the tokens that are left out.
      shuffle_distance: Tokens change places within about so many (Lample et al. 2018, section 2.3); 0: none does.
    """

    mask_rate: float = 0.0
    replace_rate: float = 0.0
    drop_rate: float = 0.0
    shuffle_distance: int = 0

    def __post_init__(self):
        for field in ("mask_rate", "replace_rate", "drop_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"TokenNoise.{field}={getattr(self, field)}: must be at least 0 and less than 1.")
        if self.shuffle_distance < 0:
            raise UserError(f"TokenNoise.shuffle_distance={self.shuffle_distance}: must not be negative.")
        if not (self.mask_rate or self.replace_rate or self.drop_rate or self.shuffle_distance):
            raise UserError("TokenNoise does nothing: set one of its rates, or shuffle_distance.")

    def build(self, tokenizer: Tokenizer, features: Features) -> Augment:
        moves = bool(self.drop_rate or self.shuffle_distance)
        side = input_side(features, "TokenNoise", moves)
        ids = text_ids(tokenizer)
        is_text = np.zeros(tokenizer.vocab_size, bool)
        is_text[ids] = True
        mask, pad = tokenizer.mask_id if self.mask_rate else 0, tokenizer.pad_id or 0

        def augment(rows: Rows, keys: Keys) -> Rows:
            tokens = rows[f"{side}_input_tokens"]
            text, bits = is_text[tokens], lambda number: _bits(keys, tokens.shape[1], number)
            replaced = uniform(bits(0)) < self.replace_rate
            tokens = np.where(text & replaced, ids[below(bits(1), len(ids))], tokens)
            tokens = np.where(text & (uniform(bits(2)) < self.mask_rate), mask, tokens).astype(np.int32)
            rows = rows | {f"{side}_input_tokens": tokens}
            if not moves:
                return rows
            place = np.arange(tokens.shape[1]) + uniform(bits(3)) * (self.shuffle_distance + 1)
            dropped = text & (uniform(bits(4)) < self.drop_rate)
            return _moved(rows, side, place, text, dropped, pad)

        return augment


def _bits(keys: Keys, length: int, number: int) -> UInt64[np.ndarray, "rows length"]:
    return random_bits(keys[:, None], np.arange(length, dtype=np.uint64) + np.uint64(number << 32))


def _moved(
    rows: Rows,
    side: str,
    place: Float64[np.ndarray, "rows length"],
    movable: Bool[np.ndarray, "rows length"],
    dropped: Bool[np.ndarray, "rows length"],
    pad: int,
) -> Rows:
    """Rows whose movable tokens are sorted by place, between the same special tokens, and closed up where some drop."""
    tokens = rows[f"{side}_input_tokens"]
    length = tokens.shape[1]
    # Runs of movable tokens, between which none passes.
    run = np.cumsum(~movable, axis=1) * 2 + movable
    order = np.argsort(run * (4.0 * length) + np.where(movable, place, 0), axis=1, kind="stable")
    dropped = np.take_along_axis(dropped, order, axis=1)
    kept = np.take_along_axis(order, np.argsort(dropped, axis=1, kind="stable"), axis=1)
    beyond = np.arange(length) >= (length - dropped.sum(axis=1))[:, None]
    out = dict(rows)
    for name in ("input_tokens", "segment_ids", "token_types"):
        if (feature := f"{side}_{name}") in rows:
            out[feature] = np.where(beyond, pad if name == "input_tokens" else 0, _taken(rows[feature], kept))
    if f"{side}_positions" in rows:
        out[f"{side}_positions"] = _positions(out[f"{side}_segment_ids"])
    return out


def _taken(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, order, axis=1)


def _positions(segments: Int32[np.ndarray, "rows length"]) -> Int32[np.ndarray, "rows length"]:
    """0, 1, 2, ... in each segment; 0 where there is none."""
    at = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    return np.where(segments > 0, at - first, 0).astype(np.int32)


@configurable
class SubwordSampling(Augmentation):
    """Words of the encoder's inputs are cut into other pieces than the best ones (Kudo 2018), of a unigram model.

    Of the `num_best` ways to cut a word one is drawn, with probabilities that go with their own to the power of
    `alpha`. Rows of one piece of text each; what outgrows the row is lost.

    Attributes:
      num_best: Ways that are drawn from.
      alpha: 0 makes all equally likely; large values the best one certain.
    """

    num_best: int = 8
    alpha: float = 0.2

    def __post_init__(self):
        if self.num_best < 2 or self.alpha < 0:
            raise UserError(f"SubwordSampling.num_best={self.num_best} and alpha={self.alpha}: at least 2 and 0.")

    def build(self, tokenizer: Tokenizer, features: Features) -> Augment:
        side = input_side(features, "SubwordSampling", moves=True)
        base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
        if not isinstance(base, SentencePieceTokenizer) or not base.is_unigram:
            raise UserError(
                "SubwordSampling needs SentencePiece's model_type = 'unigram': BPE has one way to cut a word."
            )
        texts, pad = tokenizer.token_bytes(), tokenizer.pad_id or 0

        def augment(rows: Rows, keys: Keys) -> Rows:
            inputs = rows[f"{side}_input_tokens"]
            if rows[f"{side}_segment_ids"].max(initial=0) > 1:
                raise UserError("SubwordSampling works on rows of one example: set DataConfig.layout = 'documents'.")
            fresh = np.full_like(inputs, pad)
            for row, (tokens, key) in enumerate(zip(inputs, keys, strict=True)):
                length = int((rows[f"{side}_segment_ids"][row] > 0).sum())
                cut = self._cut(tokens[:length].tolist(), texts, base, key)[: inputs.shape[1]]
                fresh[row, : len(cut)] = cut
            segments = (fresh != pad).astype(np.int32)
            return rows | {
                f"{side}_input_tokens": fresh,
                f"{side}_segment_ids": segments,
                f"{side}_positions": _positions(segments),
            }

        return augment

    def _cut(self, tokens: list[int], texts: list[bytes], model: SentencePieceTokenizer, key: np.uint64) -> list[int]:
        """The tokens of a row with every word cut anew; those without text stay."""
        out, word = [], b""
        draw = lambda number: float(uniform(random_bits(np.array([key]), np.array([number], np.uint64)))[0])
        for place, token in enumerate([*tokens, -1]):
            text = texts[token] if token >= 0 else b""
            if word and (not text or text[:1] == b" "):
                out += model.cut_word(word, self.num_best, self.alpha, draw(place))
                word = b""
            word += text
            if not text and token >= 0:
                out.append(token)
        return out
