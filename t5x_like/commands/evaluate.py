"""`t5x_like evaluate`: scores a trained model on its validation split."""

import json
from collections.abc import Sequence

import jax
from absl import flags

from t5x_like.commands import cli
from t5x_like.commands.trained import define_flags, load_trained
from t5x_like.data.build import build_data
from t5x_like.evaluation.evaluator import evaluate, make_evaluate_step
from t5x_like.training.setup import batch_target


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def command(values: flags.FlagValues) -> None:
    """Scores a trained model on the whole validation split and prints the metrics as one JSON object."""
    model = load_trained(values)
    if model is None:
        return
    data = build_data(model.experiment.data, model.directory.data)
    batches = map(data.validation.batch, range(data.validation.num_batches))
    placed = batch_target(model.experiment.data, model.mesh)
    on_devices = (jax.device_put(batch, {name: a.sharding for name, a in placed.items()}) for batch in batches)
    with jax.set_mesh(model.mesh):
        step = jax.jit(make_evaluate_step(model.graphdef, model.experiment.run.loss))
        scores = evaluate(step, model.params, on_devices, data.bytes_per_token)
    print(json.dumps({"step": model.step, "split": "validation", **scores}))
