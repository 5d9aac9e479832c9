"""A trained model from its MODEL_DIR: what evaluate and generate begin with."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh

from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.data.corpus import load_tokenizer
from t5x_like.data.tokenizers import Tokenizer, encode_marked
from t5x_like.errors import UserError
from t5x_like.inference.generate import generate, generate_from_inputs
from t5x_like.inference.sampling import Sampling
from t5x_like.models.heads import LanguageModelHeadConfig
from t5x_like.models.parameters import GraphDef, Params
from t5x_like.models.transformer import EncoderConfig, EncoderDecoderConfig, ModelConfig
from t5x_like.sharding.logical import shardings
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import with_vocabulary
from t5x_like.training.state import ModelSpec, model_spec


class Trained(NamedTuple):
    """A model with the parameters of one checkpoint."""

    experiment: Experiment
    directory: RunDirectory
    mesh: Mesh
    graphdef: GraphDef
    params: Params
    tokenizer: Tokenizer
    step: int


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model_dir", None, "Directory of the trained run.", flag_values=values)
    flags.DEFINE_string(
        "step", "latest", "Which checkpoint: a step, `latest`, or `best` on validation.", flag_values=values
    )


def load_trained(values: flags.FlagValues) -> Trained | None:
    """Reads the run that --model_dir names; None if the flags only ask to print or explain its configuration.

    Gin flags may change what does not shape the parameters, e.g. the mesh.
    """
    if values.model_dir is None:
        raise UserError("no run: pass --model_dir=DIRECTORY, the MODEL_DIR of a training run.")
    directory = RunDirectory(values.model_dir)
    directory.require()
    values.gin_file = [str(directory.operative_config), *values.gin_file]
    configured = cli.configured(values, Experiment)
    if configured is None:
        return None
    _, experiment = configured
    checkpoints = Checkpoints(directory.checkpoints, experiment.run.checkpoints)
    step = chosen_step(checkpoints, values.step)
    mesh = build_mesh(experiment.mesh)
    manifest = checkpoints.manifest(step)
    tokenizer = load_tokenizer(directory.data, manifest["tokenizer"])
    spec = model_spec(with_vocabulary(experiment.model, manifest["vocab_size"]))
    params = restore_params(checkpoints, spec, mesh, step, use_ema=experiment.run.ema_decay is not None)
    return Trained(experiment, directory, mesh, spec.graphdef, params, tokenizer, step)


def restore_params(
    checkpoints: Checkpoints, spec: ModelSpec, mesh: Mesh, step: int | None, *, use_ema: bool = False
) -> Params:
    """The parameters of a checkpoint, or their average, laid out on the mesh."""
    placed = shardings(spec.axes, spec.params, mesh)
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), spec.params, placed)
    name = "ema" if use_ema else "params"
    return checkpoints.restore({name: target}, step, partial=True)[name]


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


def continue_texts(
    model: Trained, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling, seed: int
) -> list[str]:
    """What the model writes: after each prompt, or, of an encoder-decoder, for each.

    An empty prompt starts at a document's beginning.
    """
    if isinstance(model.experiment.model, EncoderDecoderConfig):
        tokens = [encode_marked(model.tokenizer, prompt) for prompt in prompts]
    else:
        tokens = [prompt_tokens(model.tokenizer, prompt) for prompt in prompts]
    return written(model, tokens, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)


def written(
    model: Trained, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, seed: int
) -> list[str]:
    """As `continue_texts`, for prompts that are tokens."""
    config, tokenizer = model.experiment.model, model.tokenizer
    if not writes_text(config):
        raise UserError(f"{type(config).__name__} with {type(config.head).__name__} writes no text: use `evaluate`.")
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "eos_id": tokenizer.eos_id}
    with jax.set_mesh(model.mesh):
        if isinstance(config, EncoderDecoderConfig):
            start = tokenizer.pad_id or 0
            new = generate_from_inputs(model.graphdef, model.params, prompts, start_id=start, **options)
        else:
            length = model.experiment.data.sequence_length
            new = generate(model.graphdef, model.params, prompts, context_length=length, **options)
    return [tokenizer.decode(tokens) for tokens in new]


def writes_text(config: ModelConfig) -> bool:
    return not isinstance(config, EncoderConfig) and isinstance(config.head, LanguageModelHeadConfig)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    # Characters have no mark for a beginning; their first is the line break in most texts, as good a start as any.
    return [*start, *encode_marked(tokenizer, prompt)] or [0]
