"""`t5x_like convert`: imports a model from Hugging Face's format, or exports one."""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh

from t5x_like.checkpoints.manager import CheckpointConfig, Checkpoints
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.commands.trained import chosen_step, restore_params
from t5x_like.config import config_text, parse_config
from t5x_like.data.corpus import load_tokenizer
from t5x_like.data.subwords import MODEL_FILE, SentencePieceTokenizer
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.errors import UserError
from t5x_like.huggingface.directory import CONFIG, choose_family, export_params, import_params, read_config
from t5x_like.models.parameters import Params
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.state import model_spec

CARRIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
"""Files of a Hugging Face directory that go along unchanged, both ways."""

SENTENCEPIECE = "tokenizer.model"
"""Where transformers looks for a SentencePiece model."""


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("from", None, "Directory to read: a MODEL_DIR, or one of Hugging Face.", flag_values=values)
    flags.DEFINE_string("to", None, "Directory to write, which must not exist yet.", flag_values=values)
    flags.DEFINE_integer(
        "vocab_size", None, "Import: pad the vocabulary to this size. Default: none.", flag_values=values
    )
    flags.DEFINE_string("step", "latest", "Export: a step, `latest`, or `best` on validation.", flag_values=values)
    flags.DEFINE_float(
        "max_file_gb", 5.0, "Export: largest size of a file, in gigabytes.", lower_bound=0, flag_values=values
    )


def command(values: flags.FlagValues) -> None:
    """Imports a Hugging Face directory as a MODEL_DIR, or exports a MODEL_DIR as a Hugging Face directory."""
    source, target = (values[name].value for name in ("from", "to"))
    if source is None or target is None:
        raise UserError("convert needs --from=DIRECTORY to read and --to=DIRECTORY to write.")
    if values.gin_file or values.gin_bindings:
        raise UserError("convert takes no gin files and no bindings: the directory it reads holds the configuration.")
    directory = RunDirectory(source)
    directory.pull()
    source, target = directory.path, Path(target)
    is_run = directory.checkpoints.is_dir()
    if not is_run and not (source / CONFIG).is_file():
        raise UserError(
            f"--from={source} holds no model: neither checkpoints/ of a run nor the {CONFIG} of a Hugging Face model."
        )
    for name in ("vocab_size",) if is_run else ("step", "max_file_gb"):
        if values[name].present:
            raise UserError(f"--{name} has no effect when {'exporting' if is_run else 'importing'}: leave it out.")
    with new_directory(target) as work:
        # All devices share each parameter: no device, nor the host, has to hold the whole model.
        mesh = build_mesh(MeshConfig(data=1, fsdp=-1))
        if is_run:
            report = export_model(directory, work, mesh, values.step, int(values.max_file_gb * 1e9))
        else:
            report = import_model(source, work, mesh, values.vocab_size)
    print(f"{target}: {report}")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill that becomes `target` at the end, and disappears if anything goes wrong."""
    if target.exists() or target.is_symlink():
        raise UserError(f"--to={target} exists: choose a directory that does not.")
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        work.mkdir(parents=True)
        yield work
        # Onto a directory that came into being meanwhile, this fails unless that is empty.
        os.rename(work, target)
    except OSError as error:
        raise UserError(f"--to={target} could not be made: {error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def import_model(source: Path, work: Path, mesh: Mesh, padded_size: int | None) -> str:
    """Fills `work` with the MODEL_DIR of a Hugging Face model, at step 0; returns what it is."""
    family, config = read_config(source)
    vocab_size = config.vocab_size
    if padded_size is not None and padded_size < vocab_size:
        raise UserError(f"--vocab_size={padded_size}: the model has {vocab_size} tokens; padding only adds to them.")
    check_tokenizer(source, vocab_size)
    config = dataclasses.replace(config, vocab_size=padded_size or vocab_size)
    spec = model_spec(config)
    params, dtype = import_params(
        source, family, config, vocab_size=vocab_size, shapes=spec.params, axes=spec.axes, mesh=mesh
    )
    directory = RunDirectory(work)
    directory.huggingface.mkdir()
    carry(source, directory.huggingface)
    shutil.copyfile(source / CONFIG, directory.huggingface / CONFIG)
    comment = f"# A {family.model_type} model imported from {source.name}; include this file in a run file."
    directory.model_config.write_text(f"{comment}\n{config_text('MODEL', config)}")
    checkpoints = Checkpoints(directory.checkpoints, CheckpointConfig(asynchronous=False))
    checkpoints.save(0, {"params": params}, manifest={"vocab_size": vocab_size, "dtype": dtype}, force=True)
    checkpoints.close()
    return f"{family.model_type}, {num_parameters(params):,} parameters ({dtype} in the files), checkpoint of step 0"


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


class Saved(NamedTuple):
    """A model of a MODEL_DIR.

    Attributes:
      config: of the model, its vocabulary padded as in the checkpoint.
      params: of the checkpoint.
      vocab_size: tokens; more rows are padding.
      dtype: of the files it was imported from, or float32.
      max_length: of texts, in tokens.
      tokenizer: of a trained run; None: that of an imported model, whose files are kept.
    """

    config: ModelConfig
    params: Params
    vocab_size: int
    dtype: str
    max_length: int
    tokenizer: Tokenizer | None = None


def export_model(directory: RunDirectory, work: Path, mesh: Mesh, step: str, max_file_bytes: int) -> str:
    """Fills `work` with the Hugging Face directory of a MODEL_DIR's model; returns what it is."""
    saved = load_saved(directory, mesh, step)
    exact = dataclasses.replace(saved.config, vocab_size=saved.vocab_size)
    if directory.huggingface.exists():
        family, _ = read_config(directory.huggingface)
        carry(directory.huggingface, work)
        shutil.copyfile(directory.huggingface / CONFIG, work / CONFIG)
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


def load_saved(directory: RunDirectory, mesh: Mesh, step: str) -> Saved:
    """Reads a trained run, or an imported model."""
    if directory.operative_config.exists():
        experiment = parse_config([str(directory.operative_config)]).build(Experiment)
        checkpoints = Checkpoints(directory.checkpoints, experiment.run.checkpoints)
        model, max_length = experiment.model, experiment.data.sequence_length
        use_ema = experiment.run.ema_decay is not None
    elif (directory.huggingface / CONFIG).exists():
        checkpoints = Checkpoints(directory.checkpoints, CheckpointConfig())
        model, max_length, use_ema = read_config(directory.huggingface).config, 0, False
    else:
        raise UserError(f"{directory.path} has checkpoints, but not the configuration of their model: bring it back.")
    chosen = chosen_step(checkpoints, step)
    manifest = checkpoints.manifest(chosen)
    model = dataclasses.replace(model, vocab_size=checkpoints.arrays(chosen)["params", "embedding"].shape[0])
    params = restore_params(checkpoints, model_spec(model), mesh, chosen, use_ema=use_ema)
    checkpoints.close()
    if "tokenizer" in manifest:
        tokenizer = load_tokenizer(directory.data, manifest["tokenizer"])
        return Saved(model, params, tokenizer.vocab_size, "float32", max_length, tokenizer)
    return Saved(model, params, manifest["vocab_size"], manifest["dtype"], max_length)


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """Fields of config.json that name a tokenizer's special tokens."""
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_id", "eos_id", "pad_id")}
    return {name.replace("_", "_token_"): value for name, value in ids.items() if value is not None}


def carry(source: Path, target: Path) -> None:
    """Copies the files that go along unchanged."""
    for path in {path for pattern in CARRIED for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, target / path.name)


def num_parameters(params: Params) -> int:
    return sum(array.size for array in jax.tree.leaves(params))
