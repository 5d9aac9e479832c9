"""Documents that hold parts of evaluation sets are dropped, so that models are not tested on what they have read."""

import functools

import numpy as np
from jaxtyping import UInt64

from t5x_like.configurable import configurable
from t5x_like.data.prepare.document import Document, Dropped, Stage
from t5x_like.data.prepare.word_hashes import Words, words
from t5x_like.data.sources import TextSource
from t5x_like.errors import UserError


@configurable
class DecontaminationFilter(Stage):
    """Drops documents that share a run of words with an evaluation set (Brown et al. 2020, appendix C).

    Words are compared in lower case without punctuation. Evaluation texts shorter than a run are compared as a whole
    if they have at least `min_words`; shorter ones cannot be told from chance and are not compared.

    Attributes:
      evaluation: The evaluation texts, a document for each (`.jsonl`, `.txt`; with their answers, if these matter).
      num_words: Length of a run.
      min_words: Of a text that is compared as a whole.
    """

    evaluation: TextSource
    num_words: int = 13
    min_words: int = 8

    def __post_init__(self):
        if not 1 <= self.min_words <= self.num_words:
            raise UserError(
                f"DecontaminationFilter.min_words={self.min_words}: must be from 1 to num_words={self.num_words}."
            )

    def cache_key(self) -> str:
        return repr((self, self.evaluation.cache_key()))

    def process(self, document: Document) -> Document | Dropped:
        found = words(document.text, normalized=True)
        for size, known in _evaluation_ngrams(self).items():
            place = np.searchsorted(known, ngrams := found.ngrams(size))
            if (known[np.minimum(place, len(known) - 1)] == ngrams).any():
                return Dropped("part of an evaluation set")
        return document


@functools.cache
def _evaluation_ngrams(config: DecontaminationFilter) -> dict[int, UInt64[np.ndarray, "ngrams"]]:
    """Sorted hashes of the runs to look for, by their length in words."""
    collected: dict[int, list[np.ndarray]] = {}
    for text in config.evaluation.documents():
        found = Words(text, normalized=True)
        size = min(len(found.hashes), config.num_words)
        if size >= config.min_words:
            collected.setdefault(size, []).append(found.ngrams(size))
    return {size: np.unique(np.concatenate(parts)) for size, parts in sorted(collected.items())}
