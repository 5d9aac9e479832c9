"""Small corpora in shards."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from t5x_like.data.prepare.config import PrepareConfig
from t5x_like.data.prepare.engine import Engine, LocalEngine
from t5x_like.data.prepare.run import prepare
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import TokenizerConfig


def random_texts(seed: int, num_documents: int = 100) -> list[str]:
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(300)]
    return [" ".join(rng.choice(words, int(rng.integers(5, 60)))) + ".\n" for _ in range(num_documents)]


def make_corpus(
    folder: Path,
    seed: int,
    *,
    num_documents: int = 100,
    tokenizer: TokenizerConfig | None = None,
    engine: Engine | None = None,
) -> str:
    """Prepares random texts and returns the directory of the corpus, `folder`/out."""
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"text": text}) + "\n" for text in random_texts(seed, num_documents))
    (folder / "in.jsonl").write_text("".join(lines))
    config = PrepareConfig(
        files=str(folder / "in.jsonl"),
        directory=str(folder / "out"),
        shard_bytes=3000,
        tokenizer=tokenizer or SentencePieceConfig(vocab_size=300),
    )
    with open(folder / "log", "w") as log:
        prepare(config, engine or LocalEngine(1, console=Console(file=log)))
    return str(folder / "out")
