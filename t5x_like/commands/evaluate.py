"""`t5x_like evaluate`: scores a trained model on its validation split."""

import dataclasses
import json
from collections.abc import Sequence

import jax
from absl import flags, logging

from t5x_like.commands import cli, loading
from t5x_like.data.build import Data, build_data
from t5x_like.evaluation.answers import answer
from t5x_like.evaluation.evaluator import EvaluateConfig, check_reads, make_validation
from t5x_like.huggingface.tokenizer import tokenizer_config
from t5x_like.inference.model import LoadedModel
from t5x_like.inference.sampling import Sampling
from t5x_like.models.token_loss import Batch
from t5x_like.runtime.processes import is_first
from t5x_like.training.experiment import Experiment
from t5x_like.training.job import batch_target


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, lambda values: (loading.define_flags(values), cli.define_process_flags(values)))


def command(values: flags.FlagValues) -> None:
    """Scores a trained model on the whole validation split and prints the metrics as one JSON object.

    Of tasks, their own metrics too: what the model answers is compared with what is right. A model of Hugging Face's
    needs data: --gin_file=evaluate.gin --gin_file=data/text.gin --gin.TEXT_FILES=...
    """
    cli.join_processes(values)
    loaded = loading.load_model(values, EvaluateConfig, of_run)
    if loaded is None:
        return
    model, choices = loaded.model, loaded.choices
    check_reads(model.config, choices.data)
    data = read_data(loaded)
    target = batch_target(choices.data, model.placement)
    with model.placement.use():
        scores = make_validation(model.graphdef, choices.loss, data, target)(model.params)
        scores |= task_scores(model, data, target)
    if is_first():
        print(json.dumps({"step": model.step, "split": "validation", **scores}))


def of_run(experiment: Experiment) -> EvaluateConfig:
    return EvaluateConfig(data=experiment.data, loss=experiment.run.loss, mesh=experiment.mesh)


def read_data(loaded: loading.Loaded[EvaluateConfig]) -> Data:
    """The data, in the tokens of the model."""
    config, directory = loaded.choices.data, loaded.directory
    if loaded.source is not None and config.tokenizer is not None:
        config = dataclasses.replace(config, tokenizer=tokenizer_config(loaded.source))
    return build_data(config, directory.data if directory.checkpoints.is_dir() else None)


def task_scores(model: LoadedModel, data: Data, target: Batch) -> dict[str, float]:
    """The metrics of the tasks; of several, each name begins with that of its task."""
    tasks = data.config.tasks
    if not any(task.metrics for task in tasks):
        return {}
    if jax.process_count() > 1:
        logging.warning("The metrics of tasks are computed by a single process: evaluate there.")
        return {}

    def write(prompts: list[list[int]]) -> list[str]:
        # Greedily; rows that are missing are copies, so that all batches are compiled as one.
        filled = [*prompts, *prompts[:1] * (data.config.batch_size - len(prompts))]
        length = data.config.objective.answer_length(data.config.sequence_length)
        written = model.generate_from_tokens(filled, max_new_tokens=length, sampling=Sampling(temperature=0))
        return written[: len(prompts)]

    scores = {}
    for answers in answer(model.graphdef, model.params, data, target, write):
        prefix = f"{answers.task.records.name}/" if len(tasks) > 1 else ""
        scores |= {f"{prefix}{name}": value for name, value in answers.scores().items()}
    return scores
