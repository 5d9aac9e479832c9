"""Models that go from Hugging Face directories to MODEL_DIRs and back, and both kinds read."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.configurable import from_dict
from t5x_like.data.corpus import load_tokenizer
from t5x_like.data.subwords import MODEL_FILE, SentencePieceTokenizer
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError
from t5x_like.huggingface.directory import CONFIG, choose_family, export_params, import_params, read_config
from t5x_like.huggingface.families.family import Family
from t5x_like.huggingface.tokenizer import tokenizer_config
from t5x_like.models.model_spec import model_spec
from t5x_like.models.parameters import Params
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.placement import Placement

CARRIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
"""Files of a Hugging Face directory that go along unchanged, both ways."""

SENTENCEPIECE = "tokenizer.model"
"""Where transformers looks for a SentencePiece model."""


class Saved(NamedTuple):
    """A model of a MODEL_DIR, or of a Hugging Face directory.

    Attributes:
      config: of the model, its vocabulary padded as the parameters.
      params: of one step.
      vocab_size: tokens; more rows are padding.
      dtype: of the files it was imported from, or float32.
      max_length: of texts, in tokens.
      step: of the checkpoint; 0 of an imported model.
      tokenizer: of a trained run; None: that of an imported model, in `source`.
      source: the Hugging Face directory of an imported model.
    """

    config: ModelConfig
    params: Params
    vocab_size: int
    dtype: str
    max_length: int
    step: int = 0
    tokenizer: Tokenizer | None = None
    source: Path | None = None

    def read_tokenizer(self) -> Tokenizer:
        """UserError if an imported model has none that can be read."""
        return self.tokenizer or tokenizer_config(self.source).build(())


def source_of(directory: RunDirectory) -> Path:
    """The Hugging Face directory that the MODEL_DIR of an imported model holds, or that the directory is.

    Raises:
      UserError: if there is none.
    """
    for place in (directory.huggingface, directory.path):
        if (place / CONFIG).exists():
            return place
    if directory.checkpoints.is_dir():
        raise UserError(f"{directory.path} has checkpoints, but not the configuration of their model: bring it back.")
    raise UserError(
        f"MODEL_DIR {directory.address} holds no run: train first, or correct the path. Nor is it a Hugging Face "
        f"model: it has no {CONFIG}."
    )


def load_saved(
    directory: RunDirectory, placement: Placement, step: str = "latest", model: ModelConfig | None = None
) -> Saved:
    """Reads a trained run, an imported model, or a Hugging Face directory.

    Args:
      directory: where it is, pulled.
      placement: where the parameters will be.
      step: a number, `latest`, or `best` on validation.
      model: of a run, with changes that shape no parameter; None: as it was trained.

    Raises:
      UserError: if there is no model, or no such step.
    """
    if directory.operative_config.exists():
        return _load_run(directory, placement, step, model)
    source = source_of(directory)
    if source == directory.huggingface:
        return _load_imported(directory, placement, step)
    return read_model(source, placement)[1]


def _load_run(directory: RunDirectory, placement: Placement, wanted: str, model: ModelConfig | None) -> Saved:
    run = directory.read_config()["experiment"]
    checkpoints = Checkpoints(directory.checkpoints, from_dict(run["run"]["checkpoints"]))
    step = chosen_step(checkpoints, wanted)
    manifest = checkpoints.manifest(step)
    model = dataclasses.replace(model or from_dict(run["model"]), vocab_size=manifest["vocab_size"])
    use_ema = run["run"]["ema_decay"] is not None
    params = restore_params(checkpoints, model, placement, step, use_ema=use_ema)
    checkpoints.close()
    tokenizer = load_tokenizer(directory.data, manifest["tokenizer"])
    length = run["data"]["sequence_length"]
    return Saved(model, params, tokenizer.vocab_size, "float32", length, step, tokenizer)


def _load_imported(directory: RunDirectory, placement: Placement, wanted: str) -> Saved:
    checkpoints = Checkpoints(directory.checkpoints, CheckpointConfig())
    step, source = chosen_step(checkpoints, wanted), read_config(directory.huggingface)
    manifest = checkpoints.manifest(step)
    vocab_size = checkpoints.arrays(step)["params", "embedding"].shape[0]
    model = dataclasses.replace(source.config, vocab_size=vocab_size)
    params = restore_params(checkpoints, model, placement, step)
    checkpoints.close()
    facts = manifest["vocab_size"], manifest["dtype"], source.max_length
    return Saved(model, params, *facts, step, source=directory.huggingface)


def read_model(source: Path, placement: Placement, padded_size: int | None = None) -> tuple[Family, Saved]:
    """Reads a Hugging Face directory, its vocabulary padded to that size.

    Raises:
      UserError: if it is no model of a known family, or its tokenizer belongs to another.
    """
    family, config, max_length = read_config(source)
    vocab_size = config.vocab_size
    if padded_size is not None and padded_size < vocab_size:
        raise UserError(f"--vocab_size={padded_size}: the model has {vocab_size} tokens; padding only adds to them.")
    check_tokenizer(source, vocab_size)
    config = dataclasses.replace(config, vocab_size=padded_size or vocab_size)
    params, dtype = import_params(
        source, family, config, model_spec(config), vocab_size=vocab_size, placement=placement
    )
    return family, Saved(config, params, vocab_size, dtype, max_length, source=source)


def restore_params(
    checkpoints: Checkpoints, model: ModelConfig, placement: Placement, step: int | None, *, use_ema: bool = False
) -> Params:
    """The parameters of a checkpoint, or their average, where `placement` has them."""
    spec = model_spec(model)
    placed = placement.shardings(spec.axes, spec.params)
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), spec.params, placed)
    name = "ema" if use_ema else "params"
    return checkpoints.restore({name: target}, step, partial=True, layers=model.layers)[name]


def chosen_step(checkpoints: Checkpoints, wanted: str) -> int | None:
    """The step that --step names, its checkpoint verified; None: there is none at all, as restoring will say."""
    if wanted == "latest":
        return checkpoints.newest_good()
    if wanted == "best":
        best = checkpoints.best_step()
        if best is None:
            raise UserError(f"--step=best: no checkpoint in {checkpoints.directory} was evaluated; use --step=latest.")
        return checkpoints.check(best)
    if not wanted.isdecimal():
        raise UserError(f"--step={wanted}: give a number, `latest` or `best`.")
    return checkpoints.check(int(wanted))


def import_model(source: Path, work: Path, placement: Placement, padded_size: int | None) -> tuple[Family, Saved]:
    """Fills `work` with the MODEL_DIR of a Hugging Face model, at step 0; its `model.gin` is for the caller."""
    family, saved = read_model(source, placement, padded_size)
    directory = RunDirectory(work)
    directory.huggingface.mkdir()
    carry(source, directory.huggingface)
    shutil.copyfile(source / CONFIG, directory.huggingface / CONFIG)
    checkpoints = Checkpoints(directory.checkpoints, CheckpointConfig(asynchronous=False))
    layers = {place: list(numbers) for place, numbers in saved.config.layers.items()}
    manifest = {"vocab_size": saved.vocab_size, "dtype": saved.dtype, "layers": layers}
    checkpoints.save(0, {"params": saved.params}, manifest=manifest, force=True)
    checkpoints.close()
    return family, saved


def check_tokenizer(source: Path, vocab_size: int) -> None:
    """Refuses a tokenizer with tokens that the model has no embedding for."""
    path = source / "tokenizer.json"
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens", ()))], default=-1)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error!r}.") from error
    if largest >= vocab_size:
        raise UserError(
            f"{path} has the token {largest}, but the model's vocab_size is {vocab_size}: they do not belong together."
        )


def export_model(directory: RunDirectory, work: Path, placement: Placement, step: str, max_file_bytes: int) -> str:
    """Fills `work` with the Hugging Face directory of a MODEL_DIR's model; returns what it is."""
    saved = load_saved(directory, placement, step)
    exact = dataclasses.replace(saved.config, vocab_size=saved.vocab_size)
    if saved.source is not None:
        family = read_config(saved.source).family
        carry(saved.source, work)
        shutil.copyfile(saved.source / CONFIG, work / CONFIG)
    else:
        family, fields = choose_family(exact, saved.max_length)
        fields = {**fields, **special_ids(saved.tokenizer), "dtype": saved.dtype}
        (work / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        if isinstance(saved.tokenizer, SentencePieceTokenizer):
            (work / SENTENCEPIECE).write_bytes(saved.tokenizer.files()[MODEL_FILE])
    files = export_params(
        work,
        family,
        saved.config,
        saved.params,
        vocab_size=saved.vocab_size,
        dtype=saved.dtype,
        max_file_bytes=max_file_bytes,
    )
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return f"{family.model_type}, {num_parameters(saved.params):,} parameters as {saved.dtype} in {count}"


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Fields of config.json that name a tokenizer's special tokens."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id")}
    return {name.replace("_", "_token_"): value for name, value in ids.items() if value is not None}


def carry(source: Path, target: Path) -> None:
    """Copies the files that go along unchanged."""
    for path in {path for pattern in CARRIED for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, target / path.name)


def num_parameters(params: Params) -> int:
    return sum(array.size for array in jax.tree.leaves(params))
