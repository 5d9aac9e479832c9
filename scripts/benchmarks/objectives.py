"""Prints how many tokens of text per second each pre-training objective turns into batches, as a markdown table.

    python scripts/benchmarks/objectives.py

The text is the standard library's documentation. One thread; the time is the processor's, the best of several rounds,
so that other work on the machine counts little.
"""

import math
import tempfile
import time
from pathlib import Path

from absl import app, flags

from t5x_like.data.build import Data, build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.objectives.causal import CausalLM, PrefixLM
from t5x_like.data.objectives.corruption import UL2, SpanCorruption
from t5x_like.data.objectives.denoising import Denoising
from t5x_like.data.objectives.masked import MaskedLM
from t5x_like.data.objectives.permutation import PermutationLM
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import SpecialTokens

SHAPES = flags.DEFINE_list("shapes", ["16x128", "64x512"], "Rows x tokens of a batch.")
ROUNDS = flags.DEFINE_integer("rounds", 6, "Rounds, of which the fastest counts.")

OBJECTIVES = {
    "CausalLM": CausalLM(),
    "PrefixLM": PrefixLM(),
    "MaskedLM": MaskedLM(),
    "MaskedLM, whole words": MaskedLM(whole_words=True),
    "MaskedLM, next sentence": MaskedLM(pairs="next"),
    "SpanCorruption": SpanCorruption(),
    "UL2": UL2(),
    "UL2, decoder": UL2(architecture="decoder"),
    "PermutationLM": PermutationLM(),
    "Denoising": Denoising(),
}


def tokens_per_second(data: Data, num_batches: int = 10) -> float:
    """Tokens of text, those of special tokens and padding left out."""
    best = math.inf
    for _ in range(ROUNDS.value):
        start = time.thread_time()
        for step in range(num_batches):
            data.train.batch(step)
        best = min(best, time.thread_time() - start)
    return num_batches * data.config.batch_size * data.train.layout.tokens_per_row / best


def main(argv):
    special = SpecialTokens(names=("[MASK]", "[CLS]", "[SEP]", "[R]", "[S]", "[X]"), num_sentinels=100)
    tokenizer = SentencePieceConfig(vocab_size=2048, special_tokens=special)
    print("| million tokens/s |", " | ".join(SHAPES.value), "|\n|:--|", "--:|" * len(SHAPES.value))
    with tempfile.TemporaryDirectory() as directory:
        for name, objective in OBJECTIVES.items():
            layout = "documents" if objective.needs_documents else "concatenate"
            speeds = []
            for shape in SHAPES.value:
                rows, length = map(int, shape.split("x"))
                config = DataConfig(
                    sequence_length=length, batch_size=rows, tokenizer=tokenizer, layout=layout, objective=objective
                )
                data = build_data(config, Path(directory))
                speeds.append(f"{tokens_per_second(data) / 1e6:.1f}")
            print("|", name, "|", " | ".join(speeds), "|")


if __name__ == "__main__":
    app.run(main)
