"""Where words and sentences begin and end, told from tokens alone."""

import numpy as np
from jaxtyping import Bool, Int32

from t5x_like.data.tokenizers import Tokenizer


class WordEdges:
    """Which tokens begin a word.

    A word is a run of letters, digits and underscores with the spaces before it, as far as tokens tell: a token goes on
    with a word if its first character is such a one, and the last of the token before it too. Bytes of characters
    beyond ASCII are letters.
    """

    def __init__(self, tokenizer: Tokenizer):
        texts = tokenizer.token_bytes()
        self._goes_on = np.array([_is_letter(text[:1]) for text in texts])
        self._goes_over = np.array([_is_letter(text[-1:]) for text in texts])

    def begins(
        self, tokens: Int32[np.ndarray, "tokens"], is_first: Bool[np.ndarray, "tokens"]
    ) -> Bool[np.ndarray, "tokens"]:
        """True for tokens that begin a word; those for which `is_first` is true do anyway."""
        goes_over = np.concatenate([[False], self._goes_over[tokens[:-1]]])
        return is_first | ~(self._goes_on[tokens] & goes_over)


def sentence_ends(tokenizer: Tokenizer) -> Bool[np.ndarray, "vocabulary"]:
    """True for tokens that end a sentence: a mark (. ! ?) or the end of a line, or the end of a document."""
    texts = tokenizer.token_bytes()
    ends = np.array([b"\n" in text or text.rstrip(b" \"')")[-1:] in (b".", b"!", b"?") for text in texts])
    if tokenizer.eos_id is not None:
        ends[tokenizer.eos_id] = True
    return ends


def _is_letter(character: bytes) -> bool:
    return character.isalnum() or character == b"_" or character >= b"\x80"


def text_ids(tokenizer: Tokenizer) -> Int32[np.ndarray, "ids"]:
    """The ids that stand for text, among which a random token is drawn."""
    return np.flatnonzero([bool(text) for text in tokenizer.token_bytes()]).astype(np.int32)
