"""Toy experiments, small enough that a test compiles them in a second or two."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from t5x_like.data.config import DataConfig
from t5x_like.data.sources import TextSource
from t5x_like.data.tokenizers import ByteTokenizerConfig
from t5x_like.kernels.attention.masks import MaskSpec
from t5x_like.models.block import BlockConfig
from t5x_like.models.context import Context, TokenInfo
from t5x_like.models.feedforward.mlp import MLPConfig
from t5x_like.models.layer_spec import LayerSpec
from t5x_like.models.mixers.attention import AttentionConfig
from t5x_like.models.parameters import Initializers
from t5x_like.models.positions import RotaryConfig
from t5x_like.models.stack import StackConfig
from t5x_like.models.transformer import DecoderConfig, token_info
from t5x_like.sharding.mesh import MeshConfig
from t5x_like.training.experiment import Experiment, LoggingConfig, RunConfig
from t5x_like.training.optimizers import AdamWConfig, OptimizerConfig
from t5x_like.training.schedules import CosineSchedule

BATCH, LENGTH, VOCAB = 8, 16, 64


def model(*, num_heads: int = 4, dropout_rate: float = 0.0, **decoder) -> DecoderConfig:
    attention = AttentionConfig(num_heads=num_heads, rotary=RotaryConfig(), dropout_rate=dropout_rate)
    block = BlockConfig(mixer=attention, feedforward=MLPConfig(d_ff=64), dropout_rate=dropout_rate)
    stack = StackConfig(num_layers=2, block=block)
    return DecoderConfig(**{"d_model": 32, "dtype": "float32", "stack": stack, "dropout_rate": dropout_rate, **decoder})


def tokens(ids, **given) -> TokenInfo:
    """Tokens as layers see them; what is given is named as in `TokenInfo`."""
    return token_info({"decoder_input_tokens": ids, **{f"decoder_{name}": value for name, value in given.items()}})


def experiment(
    directory: Path, *, mesh: MeshConfig | None = None, decoder: DecoderConfig | None = None, **run
) -> Experiment:
    """A byte-level model of the file `text.txt` in the directory; the run's own files go to `run` there."""
    logging = LoggingConfig(every_steps=1, tensorboard=False, progress=False, sample_tokens=0)
    return Experiment(
        model=decoder or model(),
        data=DataConfig(
            source=TextSource(files=(str(directory / "text.txt"),)),
            tokenizer=ByteTokenizerConfig(),
            split="position",
            validation_fraction=0.1,
            sequence_length=LENGTH,
            batch_size=BATCH,
        ),
        optimizer=OptimizerConfig(algorithm=AdamWConfig(), schedule=CosineSchedule(learning_rate=1e-2, warmup_steps=2)),
        mesh=mesh or MeshConfig(),
        run=RunConfig(**{"model_dir": str(directory / "run"), "steps": 6, "logging": logging, **run}),
    )


def write_text(directory: Path, num_words: int = 4000) -> None:
    """Text with something to learn: words follow each other with uneven probabilities."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "from", "dog"]
    chosen = rng.choice(len(words), num_words, p=np.arange(1, 14) / 91)
    (directory / "text.txt").write_text(" ".join(words[i] for i in chosen))


def batch(seed: int = 0, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Random tokens; a third of them weigh nothing unless told otherwise."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    weights = (rng.random((BATCH, LENGTH)) > 1 / 3).astype(np.float32) if weights is None else weights
    return {
        "decoder_input_tokens": tokens[:, :-1],
        "decoder_target_tokens": tokens[:, 1:],
        "decoder_loss_weights": weights,
    }


def layer_spec(d_model: int, init, dtype="float32") -> LayerSpec:
    """What a part of a layer is built from, all projections starting alike."""
    return LayerSpec(d_model, MaskSpec(causal=True), Initializers(init, init, init), np.dtype(dtype))


def context(x, *, token_ids=None, is_token=None, dropout_key=None) -> Context:
    """What a part of a layer gets beside vectors [batch, length, embed]."""
    ids = np.zeros(x.shape[:2], np.int32) if token_ids is None else token_ids
    segment_ids = None if is_token is None else jnp.asarray(is_token).astype(np.int32)
    return Context(tokens(ids, segment_ids=segment_ids), dropout_key=dropout_key)
