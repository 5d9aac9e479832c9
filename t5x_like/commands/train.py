"""`t5x_like train`: trains a model, or resumes its training."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.commands.dry_run import dry_run
from t5x_like.commands.supervise import supervise
from t5x_like.config import save_run_config
from t5x_like.configurable import difference, to_dict
from t5x_like.data.build import Data, build_data
from t5x_like.inference.model import LoadedModel
from t5x_like.inference.sampling import Sampling
from t5x_like.runtime.processes import check_agreement, first_ahead, is_first
from t5x_like.sharding.mesh import build_mesh
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import Job, set_up
from t5x_like.training.loop import Outcome, train
from t5x_like.training.state import TrainState

CHANGEABLE = (
    "mesh",
    "run.checkpoints",
    "run.early_stopping",
    "run.effects",
    "run.evaluate_every_steps",
    "run.evaluate_num_batches",
    "run.guard",
    "run.initialize_from",
    "run.logging",
    "run.model_dir",
    "run.gradient_accumulation",
    "run.steps",
)
"""What may be another when a run is resumed: it changes how the run goes on, but not what it has learnt so far."""

CHANGEABLE_OF_STACKS = ("scan_layers", "remat", "remat_names", "pipeline")
"""The same of a stack of layers; `block` and `first` may group its blocks otherwise."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    return cli.run(functools.wraps(command)(lambda values: command(values, arguments)), argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    cli.define_process_flags(values)
    flags.DEFINE_bool(
        "dry_run", False, "Print parameters, memory, mesh and tokens per step; train nothing.", flag_values=values
    )
    flags.DEFINE_bool(
        "debug_nans",
        False,
        "End at the first step whose loss or gradient is not finite, and name the layer it comes from (slower).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "allow_changes",
        [],
        "Parts of the configuration that may differ from those of the run that is resumed, e.g. data,run.seed.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "restarts",
        0,
        "Train in a process of its own, and start it again after a crash or a hang, at most so many times in a row "
        "without a new checkpoint.",
        lower_bound=0,
        flag_values=values,
    )


def command(values: flags.FlagValues, arguments: Sequence[str]) -> int | None:
    """Trains a model, or resumes its training: the same command with the same MODEL_DIR goes on where it stopped."""
    configured = cli.configured(values, Experiment)
    if configured is None:
        return None
    config, experiment = configured
    if values.dry_run:
        print(dry_run(experiment))
        return None
    directory = RunDirectory(experiment.run.model_dir)
    if values.restarts:
        return supervise(["train", *arguments], directory, values.restarts)
    cli.join_processes(values)
    check_agreement({"experiment": to_dict(experiment)})
    with contextlib.ExitStack() as stack:
        # What can be known to be wrong is refused before anything is written.
        mesh = build_mesh(experiment.mesh)
        with first_ahead("data"):
            if is_first():
                stack.enter_context(directory.writing())
                directory.check_same_experiment(forbidden_changes(directory, experiment, values.allow_changes))
            else:
                directory.pull()
            data = build_data(experiment.data, directory.data)
            if is_first():
                directory.push()
        job = set_up(experiment, mesh, data.tokenizer.vocab_size)
        if is_first():
            save_run_config(directory.path, config, experiment)
            print(data.describe(), job.describe(), sep="\n")
        # Drawing samples is the work of a single process.
        writes = experiment.run.logging.sample_tokens and experiment.model.writes_text and jax.process_count() == 1
        draw = functools.partial(sample, experiment, job, data) if writes else None
        options = {"allow_changes": values.allow_changes, "debug_nans": values.debug_nans}
        outcome = train(experiment, job, data, directory, sample=draw, **options)
        if is_first():
            print(summary(experiment, outcome, directory))
        if outcome.complete and draw is not None:
            try:
                print(f"\nA sample:\n\n{draw(outcome.state)}")
            except Exception:  # The run is complete and saved: whatever a sample stumbles over is no failure of it.
                logging.exception("No sample could be drawn.")
    return None


def sample(experiment: Experiment, job: Job, data: Data, state: TrainState) -> str:
    """What the model writes."""
    logs, params = experiment.run.logging, state.averaged
    length, graphdef = experiment.data.sequence_length, job.spec.graphdef
    model = LoadedModel(job.model, graphdef, params, data.tokenizer, job.placement, length, int(state.step))
    options = {"max_new_tokens": logs.sample_tokens, "seed": experiment.run.seed}
    if job.model.reads_inputs and not logs.sample_prompt:
        row = data.validation.batch(0, slice(0, 1))
        is_input = row.get("encoder_segment_ids", np.ones_like(row["encoder_input_tokens"]))[0] == 1
        tokens = row["encoder_input_tokens"][0][is_input]
        written = model.generate_from_tokens([tokens.tolist()], sampling=Sampling(temperature=0.8), **options)
        return f"{model.tokenizer.decode(tokens)}\n\n-> {written[0]}"
    return logs.sample_prompt + model.generate([logs.sample_prompt], temperature=0.8, **options)[0]


def forbidden_changes(directory: RunDirectory, experiment: Experiment, allow_changes: Sequence[str] = ()) -> list[str]:
    """Differences to the run in the directory that resuming does not allow; empty for a new run."""
    saved = directory.read_config()
    if saved is None:
        return []
    stacks, old, new = list(experiment.model.stacks), saved["experiment"], to_dict(experiment)
    for stack in stacks:
        regroup(old["model"].get(stack), new["model"][stack])
    changeable = [*CHANGEABLE, *(f"model.{stack}.{name}" for stack in stacks for name in CHANGEABLE_OF_STACKS)]
    return [
        line
        for line in difference(old, new)
        if not any(line.startswith((f"{path}:", f"{path}.")) for path in [*changeable, *allow_changes])
    ]


def regroup(old: dict[str, Any] | None, new: dict[str, Any]) -> None:
    """Groups the blocks of a stack as another does that has the same block for every layer; both as by `to_dict`."""

    def blocks(stack: dict[str, Any]) -> list[dict[str, Any]]:
        cycle = stack["block"] if isinstance(stack["block"], list) else [stack["block"]]
        return [*stack["first"], *itertools.islice(itertools.cycle(cycle), stack["num_layers"] - len(stack["first"]))]

    if old is not None and blocks(old) == blocks(new):
        new["block"], new["first"] = old["block"], old["first"]


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
    if outcome.time:
        lines.append(outcome.time)
    at = lambda path: f"{directory.address}/{path.name}"
    lines.append(
        f"Curves: {at(directory.loss_plot)}; metrics: {at(directory.metrics)}; checkpoints: {directory.checkpoints}"
    )
    if not outcome.complete:
        lines.append("The same command resumes it.")
    return "\n".join(lines)
