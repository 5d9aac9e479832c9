from t5x_like.data.tokenizers import read_tokenizer

LETTERS = '''
import numpy as np

from t5x_like.configurable import configurable
from t5x_like.data.tokenizers import ExistingTokenizerConfig, SpecialTokens, Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@configurable
class LettersConfig(ExistingTokenizerConfig):
    """Lower-case letters; all else is id 1.

    Attributes:
      special_tokens: ids behind these.
    """

    special_tokens: SpecialTokens = SpecialTokens()

    def build_plain(self, documents):
        return Letters()


class Letters(Tokenizer, kind="letters"):
    vocab_size = 28
    bos_id = eos_id = 0
    pad_id, unk_id = None, 1

    def encode(self, text):
        return np.array([LETTERS.find(letter) + 2 for letter in text.lower()], np.int32)

    def decode(self, ids):
        return "".join(LETTERS[i - 2] for i in ids if i > 1)

    def token_bytes(self):
        return [b"", b" ", *(letter.encode() for letter in LETTERS)]
'''


def test_a_tokenizer(train, tmp_path):
    records = train(LETTERS, **{"DataConfig.tokenizer": "@LettersConfig()"})
    assert records[0]["loss"] < 4  # log(28) = 3.3
    (kept,) = (tmp_path / "run" / "data").glob("*/vocabulary.json")
    tokenizer = read_tokenizer(kept.parent)
    assert (type(tokenizer).__name__, tokenizer.vocab_size) == ("Letters", 28)
