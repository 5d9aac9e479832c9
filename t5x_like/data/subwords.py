"""SentencePiece: subwords learned from the run's text, or a model that exists (Kudo and Richardson 2018).

Trained models lose nothing: white space and line ends are kept, and characters without a piece become bytes. (One
exception of the library: the character U+2581 decodes as a space.)
"""

import io
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from absl import logging
from jaxtyping import Int32

from t5x_like.configurable import configurable
from t5x_like.data.tokenizers import (
    Documents,
    ExistingTokenizerConfig,
    SizedTokenizerConfig,
    SpecialTokens,
    Tokenizer,
    sample,
)
from t5x_like.errors import UserError
from t5x_like.files import fingerprint

MODEL_FILE = "spiece.model"

# What models of others call their special tokens; no piece learned from text looks so.
_SPECIAL = re.compile(r"\[[A-Z][A-Z0-9]*\]|<extra_id_\d+>")


@configurable
class SentencePieceConfig(SizedTokenizerConfig):
    """Subwords trained on the training split of the run's text.

    Attributes:
      vocab_size: Number of ids, with pad 0, eos 1, unk 2 and the 256 bytes.
      model_type: `bpe`: byte-pair encoding, which trains in a second; `unigram`: the unigram language model of T5, a
        few seconds per megabyte of `sample_size`, about 1 % fewer tokens.
      sample_size: Characters to train on, taken from all over the split (bounds time and memory).
      special_tokens: Ids behind these.
    """

    vocab_size: int = 4096
    model_type: Literal["unigram", "bpe"] = "bpe"
    sample_size: int = 4_000_000
    special_tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self):
        for field in ("vocab_size", "sample_size"):
            if getattr(self, field) < 1:
                raise UserError(f"SentencePieceConfig.{field}={getattr(self, field)}: must be positive.")

    def build_plain(self, documents: Documents) -> "SentencePieceTokenizer":
        """UserError when the text has too few pieces, or too many characters, for the vocabulary."""
        texts = sample(documents.train(), self.sample_size)
        start = time.perf_counter()
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=self.vocab_size,
                model_type=self.model_type,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                # Nothing is lost: spaces, line ends and rare characters come back as they were.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                # Indentation of any depth is one piece.
                allow_whitespace_only_pieces=True,
                max_sentence_length=2**20,
                # Less work for unigram than the defaults: a third of the time, the same compression.
                seed_sentencepiece_size=200_000,
                num_sub_iterations=1,
                # The model depends on the number of threads: fixed, so that every machine trains the same one.
                num_threads=4,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(self._explain(str(error))) from error
        seconds = time.perf_counter() - start
        logging.info("Trained SentencePiece on %.1f MB of text in %.1f s.", sum(map(len, texts)) / 1e6, seconds)
        return SentencePieceTokenizer(model.getvalue())

    def _explain(self, error: str) -> str:
        field = f"SentencePieceConfig.vocab_size={self.vocab_size}"
        if largest := re.search(r"too high .* <= (\d+)", error):
            return f"{field} is larger than the corpus allows: set it to {largest[1]} or less, or use more text."
        if smallest := re.search(r"smaller than required_chars. \d+ vs (\d+)", error):
            return f"{field} is smaller than the text's characters with the 256 bytes: set it to {smallest[1]} or more."
        return f"{self} cannot be trained on this text: {error}"


@configurable
class SentencePieceFileConfig(ExistingTokenizerConfig):
    """A SentencePiece model that exists, such as T5's `spiece.model`.

    Attributes:
      model_file: Path of the `.model` file.
      special_tokens: Ids behind those of the model, for the tokens that it has not got itself. T5's model has no
        sentinels: 100 of them make its vocabulary of 32,100.
    """

    model_file: str
    special_tokens: SpecialTokens = SpecialTokens()

    def cache_key(self) -> str:
        return repr((fingerprint(self._read()), self.special_tokens))

    def build_plain(self, documents: Documents | None) -> "SentencePieceTokenizer":
        try:
            return SentencePieceTokenizer(self._read())
        except RuntimeError as error:
            raise UserError(f"{self.model_file} is not a SentencePiece model ({error}).") from error

    def _read(self) -> bytes:
        try:
            return Path(self.model_file).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"SentencePieceFileConfig.model_file: cannot read it: {error}.") from error


class SentencePieceTokenizer(Tokenizer, kind="sentencepiece"):
    """A SentencePiece model, from its serialised form."""

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        ids = (getattr(self._processor, f"{name}_id")() for name in ("bos", "eos", "pad", "unk"))
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (None if i < 0 else i for i in ids)
        if self.bos_id is None:
            self.bos_id = self.eos_id
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        self.special_ids = {piece: i for i, piece in enumerate(pieces) if _SPECIAL.fullmatch(piece)}

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        return np.array(self._processor.encode(text), np.int32)

    @property
    def is_unigram(self) -> bool:
        """Whether there are several ways to cut a word, each with a probability."""
        try:
            self._processor.nbest_encode("a", nbest_size=2, out_type=int)
        except RuntimeError:
            return False
        return True

    def cut_word(self, word: bytes, num_best: int, alpha: float, draw: float) -> list[int]:
        """One of the best ways to cut a text, chosen by a number from 0 to 1 (Kudo 2018, section 3.2)."""
        text = word.decode(errors="replace")
        ways = self._processor.nbest_encode(text, nbest_size=num_best, out_type=int)
        logits = alpha * np.array([sum(map(self._processor.get_score, way)) for way in ways])
        shares = np.cumsum(np.exp(logits - logits.max()))
        return ways[int(np.searchsorted(shares, draw * shares[-1], side="right"))]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
        ids = self._processor.encode(list(texts), num_threads=os.cpu_count())
        return [np.array(tokens, np.int32) for tokens in ids]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def token_bytes(self) -> list[bytes]:
        return [self._bytes_of(i) for i in range(self.vocab_size)]

    def _bytes_of(self, i: int) -> bytes:
        piece, model = self._processor.id_to_piece(i), self._processor
        if model.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        has_text = not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i) or piece in self.special_ids)
        return piece.replace("\u2581", " ").encode() if has_text else b""

    def files(self) -> dict[str, bytes]:
        return {**self.described(), MODEL_FILE: self._model}

    @classmethod
    def read(cls, facts: Mapping[str, Any], directory: Path) -> "SentencePieceTokenizer":
        return cls((directory / MODEL_FILE).read_bytes())
