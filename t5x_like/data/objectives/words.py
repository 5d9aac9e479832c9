"""Where words begin and sentences end, told from tokens alone."""

import numpy as np
from jaxtyping import Bool, Int32

from t5x_like.data.tokenizers import Tokenizer


class Edges:
    """Edges of words and sentences in flat arrays of tokens.

    A word is a run of letters, digits and underscores with the spaces before it, as far as tokens tell: a token goes on
    with a word if its first character is such a one, and the last of the token before it too. Bytes of characters
    beyond ASCII are letters. A sentence ends behind a mark (. ! ?) that white space follows, a line, or a document.
    """

    def __init__(self, tokenizer: Tokenizer):
        texts = tokenizer.token_bytes()
        self._starts_with_letter = np.array([_is_letter(text[:1]) for text in texts])
        self._ends_with_letter = np.array([_is_letter(text[-1:]) for text in texts])
        # Without text: the end of a document, or another that is no part of a sentence.
        self._starts_with_space = np.array([not text or text[:1].isspace() for text in texts])
        self._ends_with_mark = np.array([text.rstrip(b"\"')").endswith((b".", b"!", b"?")) for text in texts])
        self._ends_sentence = np.array([text.rstrip(b" \t").endswith(b"\n") for text in texts])
        if tokenizer.eos_id is not None:
            self._ends_sentence[tokenizer.eos_id] = True

    def begin_words(
        self, tokens: Int32[np.ndarray, "tokens"], is_first: Bool[np.ndarray, "tokens"]
    ) -> Bool[np.ndarray, "tokens"]:
        """True for tokens that begin a word; those for which `is_first` is true do anyway."""
        goes_over = np.concatenate([[False], self._ends_with_letter[tokens[:-1]]])
        return is_first | ~(self._starts_with_letter[tokens] & goes_over[: len(tokens)])

    def end_sentences(self, tokens: Int32[np.ndarray, "tokens"]) -> Bool[np.ndarray, "tokens"]:
        """True for tokens that end a sentence."""
        space_follows = np.append(self._starts_with_space[tokens[1:]], True)[: len(tokens)]
        return self._ends_sentence[tokens] | (self._ends_with_mark[tokens] & space_follows)


def _is_letter(character: bytes) -> bool:
    return character.isalnum() or character == b"_" or character >= b"\x80"


def text_ids(tokenizer: Tokenizer) -> Int32[np.ndarray, "ids"]:
    """The ids that stand for text, among which a random token is drawn."""
    return np.flatnonzero([bool(text) for text in tokenizer.token_bytes()]).astype(np.int32)
