"""Text of random bytes and tokenizers with special tokens, for tests of objectives."""

import numpy as np

from t5x_like.data.batches import ShuffledBatches
from t5x_like.data.tokenizers import ByteTokenizerConfig, SpecialTokens
from t5x_like.data.tokens import Tokens

SPECIAL = SpecialTokens(names=("[MASK]", "[CLS]", "[SEP]", "[R]", "[S]", "[X]"), num_sentinels=100)
TOKENIZER = ByteTokenizerConfig(special_tokens=SPECIAL).build(None)
EOS = TOKENIZER.eos_id


def text(lengths, seed: int = 0) -> Tokens:
    """Documents of so many tokens, eos included: printable characters that tell little of what stands beside them."""
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(35, 130, length - 1), EOS) for length in lengths]
    ends = np.cumsum(lengths) + 1
    return Tokens(np.concatenate([[EOS], *documents]), ends - np.array(lengths), ends, 0)


def batches(objective, tokens: Tokens, *, length: int, layout: str = "concatenate", batch_size: int = 8, seed: int = 0):
    """The layout and the batches of training that a run with this objective has."""
    transform = objective.build(TOKENIZER, length, packed=layout == "pack")
    rows = objective.lay_out(tokens, length, layout)
    return rows, ShuffledBatches(rows, transform, batch_size, seed)


def rows_in_order(objective, tokens: Tokens, *, length: int, layout: str = "concatenate", seed: int = 0):
    """The text and the features of all rows, once each."""
    rows, training = batches(objective, tokens, length=length, layout=layout)
    index = np.arange(rows.num_rows)
    return rows.read(index), training.transform(
        rows, index, np.random.default_rng(seed).integers(0, 2**63, len(index)).astype(np.uint64)
    )


def segments(features, side: str):
    """Yields (row, segment, mask over the row) of all segments of encoder or decoder."""
    ids = features[f"{side}_segment_ids"]
    for row, segment in sorted({(row, ids[row, column]) for row, column in zip(*np.nonzero(ids), strict=True)}):
        yield row, segment, ids[row] == segment


def pieces_of(text):
    """The tokens of each piece of text, by (row, number from 1)."""
    bounds = np.append(text.pieces.begins, len(text.tokens))
    return {
        (row, number + 1): text.tokens[begin:end].tolist()
        for row, number, begin, end in zip(text.pieces.rows, text.pieces.number, bounds, bounds[1:], strict=False)
    }
