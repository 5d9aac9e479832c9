"""What commands share that begin with a trained model."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from absl import flags

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.errors import UserError
from t5x_like.huggingface.convert import source_of
from t5x_like.inference.load import load_from
from t5x_like.inference.model import LoadedModel
from t5x_like.sharding.mesh import MeshConfig, place
from t5x_like.training.experiment import Experiment

C = TypeVar("C", bound="HasMesh")


class HasMesh(Protocol):
    """A configuration with a mesh."""

    mesh: MeshConfig


class Loaded(NamedTuple, Generic[C]):
    """A model, its directory, what to do with it, and the Hugging Face directory of one that is not of a run."""

    model: LoadedModel
    directory: RunDirectory
    choices: C
    source: Path | None


def define_flags(values: flags.FlagValues) -> None:
    """The flags of commands that begin with a trained model; see `load_model`."""
    flags.DEFINE_string(
        "model_dir", None, "Directory of the trained run, or of a Hugging Face model.", flag_values=values
    )
    flags.DEFINE_string(
        "step", "latest", "Which checkpoint: a step, `latest`, or `best` on validation.", flag_values=values
    )


def load_model(values: flags.FlagValues, root: type[C], of_run: Callable[[Experiment], C]) -> Loaded[C] | None:
    """Loads what --model_dir names; None if the flags only ask to print or explain its configuration.

    Gin flags may change what does not shape the parameters, e.g. the mesh.

    Args:
      values: of the flags.
      root: what the gin flags configure where the model is not that of a run.
      of_run: the same, of a run.
    """
    if values.model_dir is None:
        raise UserError("no run: pass --model_dir=DIRECTORY, the MODEL_DIR of a training run.")
    directory = RunDirectory(values.model_dir)
    directory.pull()
    is_run = directory.operative_config.exists()
    source = None if is_run else source_of(directory)
    if is_run:
        directory.read_config()  # before gin stumbles over the names of an older version
        values.gin_file = [str(directory.operative_config), *values.gin_file]
    read = cli.built(values, Experiment if is_run else root)
    if read is None:
        return None
    choices = of_run(read[1]) if is_run else read[1]
    model = load_from(directory, place(choices.mesh), values.step, read[1].model if is_run else None)
    return Loaded(model, directory, choices, source)
