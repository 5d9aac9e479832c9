"""`t5x_like evaluate`: scores a trained model on its validation split."""

import json
from collections.abc import Sequence

import jax
from absl import flags, logging

from t5x_like.commands import cli
from t5x_like.commands.trained import Trained, define_flags, load_trained, written
from t5x_like.data.build import Data, build_data
from t5x_like.evaluation.answers import answer
from t5x_like.evaluation.evaluator import make_validation
from t5x_like.inference.sampling import Sampling
from t5x_like.models.token_loss import Batch
from t5x_like.runtime.processes import is_first
from t5x_like.sharding.mesh import choices_of
from t5x_like.training.job import batch_target


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, lambda values: (define_flags(values), cli.define_process_flags(values)))


def command(values: flags.FlagValues) -> None:
    """Scores a trained model on the whole validation split and prints the metrics as one JSON object.

    Of tasks, their own metrics too: what the model answers is compared with what is right.
    """
    cli.join_processes(values)
    model = load_trained(values)
    if model is None:
        return
    data = build_data(model.experiment.data, model.directory.data)
    experiment, target = model.experiment, batch_target(model.experiment.data, model.mesh)
    with jax.set_mesh(model.mesh), choices_of(experiment.mesh):
        scores = make_validation(model.graphdef, experiment.run.loss, data, target)(model.params)
        scores |= task_scores(model, data, target)
    if is_first():
        print(json.dumps({"step": model.step, "split": "validation", **scores}))


def task_scores(model: Trained, data: Data, target: Batch) -> dict[str, float]:
    """The metrics of the tasks; of several, each name begins with that of its task."""
    tasks = data.config.tasks
    if not any(task.metrics for task in tasks):
        return {}
    if jax.process_count() > 1:
        logging.warning("The metrics of tasks are computed by a single process: evaluate there.")
        return {}

    def write(prompts: list[list[int]]) -> list[str]:
        # Greedily; rows that are missing are copies, so that all batches are compiled as one.
        filled = [*prompts, *prompts[:1] * (experiment.data.batch_size - len(prompts))]
        options = {
            "max_new_tokens": experiment.data.objective.answer_length(experiment.data.sequence_length),
            "sampling": Sampling(temperature=0),
            "seed": 0,
        }
        return written(model, filled, **options)[: len(prompts)]

    experiment, scores = model.experiment, {}
    for answers in answer(model.graphdef, model.params, data, target, write):
        prefix = f"{answers.task.records.name}/" if len(tasks) > 1 else ""
        scores |= {f"{prefix}{name}": value for name, value in answers.scores().items()}
    return scores
