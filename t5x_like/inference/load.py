"""Models from their directories: runs, imported models, and Hugging Face's."""

import os

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.configurable import configurable
from t5x_like.huggingface.convert import load_saved
from t5x_like.inference.model import LoadedModel
from t5x_like.models.model_spec import model_spec
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.mesh import MeshConfig, place
from t5x_like.sharding.placement import Placement


@configurable
class GenerateConfig:
    """What a model that no run has trained needs to be told to write text.

    Attributes:
      mesh: how devices share the work.
    """

    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)


def load(
    directory: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    mesh: MeshConfig | None = None,
) -> LoadedModel:
    """The model of a run, of an imported model, or of a Hugging Face directory, with its own tokenizer.

    Args:
      directory: MODEL_DIR, or a directory with `config.json` and `.safetensors` files.
      step: which checkpoint: a step, `latest`, or `best` on validation.
      mesh: how devices share the work; None: all share each parameter.

    Raises:
      UserError: if there is no model, no such checkpoint, or no tokenizer that can be read.
    """
    run = RunDirectory(directory)
    run.pull()
    return load_from(run, place(mesh or MeshConfig(data=1, fsdp=-1)), str(step))


def load_from(
    directory: RunDirectory, placement: Placement, step: str, config: ModelConfig | None = None
) -> LoadedModel:
    """As `load`; `config` is that of a run's model with changes that shape no parameter, None: as it was trained."""
    saved = load_saved(directory, placement, step, config)
    tokenizer, graphdef = saved.read_tokenizer(), model_spec(saved.config).graphdef
    return LoadedModel(saved.config, graphdef, saved.params, tokenizer, placement, saved.max_length, saved.step)
