"""`t5x_like evaluate`: scores a trained model on its validation split."""

import json
from collections.abc import Sequence

import jax
from absl import flags

from t5x_like.commands import cli
from t5x_like.commands.trained import define_flags, load_trained
from t5x_like.data.build import build_data
from t5x_like.evaluation.evaluator import make_validation
from t5x_like.sharding.mesh import choices_of
from t5x_like.sharding.processes import is_first
from t5x_like.training.setup import batch_target


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, lambda values: (define_flags(values), cli.define_process_flags(values)))


def command(values: flags.FlagValues) -> None:
    """Scores a trained model on the whole validation split and prints the metrics as one JSON object."""
    cli.join_processes(values)
    model = load_trained(values)
    if model is None:
        return
    data = build_data(model.experiment.data, model.directory.data)
    experiment, target = model.experiment, batch_target(model.experiment.data, model.mesh)
    with jax.set_mesh(model.mesh), choices_of(experiment.mesh):
        scores = make_validation(model.graphdef, experiment.run.loss, data, target)(model.params)
    if is_first():
        print(json.dumps({"step": model.step, "split": "validation", **scores}))
