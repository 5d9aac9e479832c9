"""`t5x_like train`: trains a model, or resumes its training."""

import json
from collections.abc import Sequence

import numpy as np
from absl import flags

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.commands.dry_run import dry_run
from t5x_like.commands.trained import Trained, continue_texts, writes_text, written
from t5x_like.config import difference, save_run_config, to_dict
from t5x_like.data.build import Data, build_data
from t5x_like.decoding.sampling import Sampling
from t5x_like.models.transformer import EncoderDecoderConfig
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.loop import Outcome, train
from t5x_like.training.setup import set_up

CHANGEABLE = (
    "mesh",
    "model.stack.remat",
    "model.stack.remat_names",
    "run.checkpoints",
    "run.early_stopping",
    "run.evaluate_every_steps",
    "run.evaluate_num_batches",
    "run.logging",
    "run.model_dir",
    "run.num_microbatches",
    "run.steps",
)
"""What may be another when a run is resumed: it changes how the run goes on, but not what it has learnt so far."""


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "dry_run", False, "Print parameters, memory, mesh and tokens per step; train nothing.", flag_values=values
    )


def command(values: flags.FlagValues) -> None:
    """Trains a model, or resumes its training: the same command with the same MODEL_DIR goes on where it stopped."""
    configured = cli.configured(values, Experiment)
    if configured is None:
        return
    config, experiment = configured
    if values.dry_run:
        print(dry_run(experiment))
        return
    directory = RunDirectory(experiment.run.model_dir)
    with directory.writing():
        directory.check_same_experiment(forbidden_changes(directory, experiment))
        mesh = build_mesh(experiment.mesh)
        data = build_data(experiment.data, directory.data)
        job = set_up(experiment, mesh, data.tokenizer.vocab_size)
        save_run_config(directory.path, config, experiment)
        print(data.describe(), job.describe(), sep="\n")
        outcome = train(experiment, job, data, directory)
        print(summary(experiment, outcome, directory))
        logs = experiment.run.logging
        if outcome.complete and logs.sample_tokens and writes_text(experiment.model):
            params = outcome.state.params if outcome.state.ema is None else outcome.state.ema
            model = Trained(
                experiment, directory, mesh, job.spec.graphdef, params, data.tokenizer, int(outcome.state.step)
            )
            print(f"\nA sample:\n\n{sample(model, data)}")


def sample(model: Trained, data: Data) -> str:
    """What a trained model writes, behind what it was given."""
    logs = model.experiment.run.logging
    options = {
        "max_new_tokens": logs.sample_tokens,
        "sampling": Sampling(temperature=0.8),
        "seed": model.experiment.run.seed,
    }
    if isinstance(model.experiment.model, EncoderDecoderConfig) and not logs.sample_prompt:
        row = data.validation.batch(0, slice(0, 1))
        is_input = row.get("encoder_segment_ids", np.ones_like(row["encoder_input_tokens"]))[0] == 1
        tokens = row["encoder_input_tokens"][0][is_input]
        return f"{model.tokenizer.decode(tokens)}\n\n-> {written(model, [tokens.tolist()], **options)[0]}"
    return logs.sample_prompt + continue_texts(model, [logs.sample_prompt], **options)[0]


def forbidden_changes(directory: RunDirectory, experiment: Experiment) -> list[str]:
    """Differences to the run in the directory that resuming does not allow; empty for a new run."""
    if not directory.config.exists():
        return []
    saved = json.loads(directory.config.read_text())["experiment"]
    return [
        line
        for line in difference(saved, to_dict(experiment))
        if not any(line.startswith((f"{path}:", f"{path}.")) for path in CHANGEABLE)
    ]


def summary(experiment: Experiment, outcome: Outcome, directory: RunDirectory) -> str:
    lines = [f"Training {outcome.reason}."]
    if outcome.scores is not None:
        scores = outcome.scores
        formats = {
            "loss": "loss {:.4f}",
            "perplexity": "perplexity {:.2f}",
            "bits_per_byte": "{:.3f} bits per byte",
            "accuracy": "accuracy {:.1%}",
            "pair_accuracy": "accuracy on pairs {:.1%}",
        }
        shown = [text.format(scores[name]) for name, text in formats.items() if name in scores]
        lines.append(f"Validation: {', '.join(shown)}")
    lines.append(f"Curves: {directory.loss_plot}; metrics: {directory.metrics}; checkpoints: {directory.checkpoints}")
    if not outcome.complete:
        lines.append("The same command resumes it.")
    return "\n".join(lines)
