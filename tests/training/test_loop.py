import dataclasses
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from t5x_like.checkpoints.manager import CheckpointConfig
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.data.build import build_data
from t5x_like.errors import UserError
from t5x_like.learning.loss import LossConfig, batch_loss
from t5x_like.reporting.metrics import read_metrics
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training import loop
from t5x_like.training.experiment import EarlyStoppingConfig, Experiment
from t5x_like.training.job import set_up
from t5x_like.training.loop import Outcome
from tests import toy


@pytest.fixture
def directory(tmp_path):
    toy.write_text(tmp_path)
    return tmp_path


def train(experiment: Experiment, devices: int = 1, **options) -> Outcome:
    directory = RunDirectory(experiment.run.model_dir)
    mesh = build_mesh(experiment.mesh, jax.devices()[:devices])
    with directory.writing():
        data = build_data(experiment.data, directory.data)
        return loop.train(experiment, set_up(experiment, mesh, data.tokenizer.vocab_size), data, directory, **options)


def trace(experiment: Experiment) -> list[tuple]:
    """All that a metrics file says of learning: (step, split, loss, gradient norm)."""
    records = read_metrics(RunDirectory(experiment.run.model_dir).metrics)
    return [(r["step"], r["split"], r["loss"], r.get("grad_norm")) for r in records if r["split"] != "norms"]


def with_run(experiment: Experiment, **run) -> Experiment:
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, **run))


def test_the_order_of_effects_and_the_files_of_a_run(directory):
    checkpoints = CheckpointConfig(save_every_steps=2)
    experiment = toy.experiment(directory, evaluate_every_steps=3, checkpoints=checkpoints)
    outcome = train(experiment)
    assert outcome.complete
    assert outcome.reason == "complete at step 6"
    steps = [(step, split) for step, split, *_ in trace(experiment)]
    train_steps = [(step, "train") for step in range(1, 7)]
    assert steps == [*train_steps[:3], (3, "validation"), *train_steps[3:], (6, "validation")]
    records = read_metrics(directory / "run" / "metrics.jsonl")
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "tokens_per_second", "num_tokens"} <= set(records[0])
    assert {"loss", "perplexity", "bits_per_byte", "accuracy"} <= set(records[-1])
    np.testing.assert_allclose(records[-1]["perplexity"], np.exp(records[-1]["loss"]))
    # One byte is one token here, but for the end of the text.
    np.testing.assert_allclose(records[-1]["bits_per_byte"], records[-1]["loss"] / np.log(2), rtol=0.01)
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert sorted(path.name for path in (directory / "run" / "checkpoints").iterdir()) == ["4", "6"]
    assert (directory / "run" / "loss.png").stat().st_size > 1000


def test_a_run_in_two_parts_is_the_run_in_one(directory):
    (directory / "whole").mkdir()
    toy.write_text(directory / "whole")
    whole = toy.experiment(directory / "whole", decoder=toy.model(dropout_rate=0.1), ema_decay=0.9)
    outcome = train(whole)
    parts = toy.experiment(directory, decoder=toy.model(dropout_rate=0.1), ema_decay=0.9)
    # The learning rate must not know where the first part ends, so it is interrupted, not shortened.
    interrupt_after(3, parts)
    assert [step for step, split, *_ in trace(parts) if split == "train"] == [1, 2, 3]
    resumed = train(parts)
    assert trace(parts) == trace(whole)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(outcome.state), jax.device_get(resumed.state))


def interrupt_after(step: int, experiment: Experiment) -> None:
    """Trains until SIGTERM arrives in the given step."""
    original = loop.Reporter.advance

    def advance(self, number, metrics):
        original(self, number, metrics)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Reporter, "advance", advance)
        outcome = train(experiment)
    assert outcome.reason == f"interrupted at step {step}"
    assert not outcome.complete


def test_a_run_resumes_on_another_mesh(directory):
    experiment = toy.experiment(directory)
    interrupt_after(3, experiment)
    train(dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=2, tensor=2)), devices=4)
    (directory / "whole").mkdir()
    toy.write_text(directory / "whole")
    whole = toy.experiment(directory / "whole")
    train(whole)
    losses = [[loss for *_, loss, _ in trace(e)] for e in (experiment, whole)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(directory):
    experiment = toy.experiment(directory)
    train(experiment)
    before = (directory / "run" / "metrics.jsonl").read_bytes()
    outcome = train(experiment)
    assert outcome.complete
    assert outcome.reason == "nothing to do: the run ended at step 6"
    assert outcome.scores["loss"] == json.loads(before.splitlines()[-1])["loss"]
    assert (directory / "run" / "metrics.jsonl").read_bytes() == before


def test_other_data_is_refused(directory):
    experiment = toy.experiment(directory, steps=2)
    train(experiment)
    data = dataclasses.replace(experiment.data, seed=1)
    with pytest.raises(
        UserError, match=r"data has changed since checkpoint .*/2: data .allow with --allow_changes=data."
    ):
        train(dataclasses.replace(with_run(experiment, steps=4), data=data))
    outcome = train(dataclasses.replace(with_run(experiment, steps=4), data=data), allow_changes=["data.seed"])
    assert outcome.reason == "complete at step 4"


def test_early_stopping_ends_a_run_and_keeps_it_ended(directory):
    stopping = EarlyStoppingConfig(patience=2, min_delta=100.0)
    experiment = toy.experiment(directory, early_stopping=stopping, evaluate_every_steps=1)
    outcome = train(experiment)
    # The first evaluation improves on nothing at all; two more do not improve by 100.
    assert outcome.reason == "stopped early at step 3"
    assert train(experiment).reason == "nothing to do: the run ended at step 3"


@pytest.mark.parametrize(
    ("metric", "values", "ends"),
    [
        ("loss", [3.0, 2.0, 2.5], False),
        ("loss", [3.0, 2.0, 2.5, 2.1], True),
        ("loss", [3.0, 2.0, 1.995, 1.991], True),  # each less than min_delta
        ("accuracy", [0.1, 0.2, 0.3], False),
        ("accuracy", [0.3, 0.2, 0.1], True),
        ("loss", [], False),
    ],
)
def test_early_stopping_counts_evaluations_without_improvement(metric, values, ends):
    assert EarlyStoppingConfig(metric=metric, patience=2, min_delta=0.01).exhausted(values) == ends


def test_the_step_is_compiled_once(directory):
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        original = loop.compile_step
        patch.setattr(loop, "compile_step", lambda job: compiled.append(job) or original(job))
        train(toy.experiment(directory))
    assert len(compiled) == 1


def test_training_outside_the_main_thread_leaves_signals_alone(directory):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(train(toy.experiment(directory, steps=2))))
    thread.start()
    thread.join()
    assert outcomes[0].complete


def test_a_failing_picture_does_not_end_the_run(directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5x_like.training.reporter.plot_losses", lambda *paths: 1 / 0)
        assert train(toy.experiment(directory)).complete


def test_masked_validation_rows_weigh_nothing(directory):
    """The last batch is padded: scores must be those of the whole split, row by row."""
    experiment = toy.experiment(directory, steps=2)
    outcome = train(experiment)
    data = build_data(experiment.data, directory / "run" / "data")
    job = set_up(experiment, build_mesh(MeshConfig(), jax.devices()[:1]), data.tokenizer.vocab_size)
    results = [batch_loss(LossConfig(), job.spec.graphdef, outcome.state.params, data.validation.batch(i))[1]
            for i in range(data.validation.num_batches)]  # fmt: skip
    expected = sum(float(r.sums["tokens"]["loss"]) for r in results) / data.validation.layout.num_tokens
    np.testing.assert_allclose(outcome.scores["loss"], expected, rtol=1e-5)
    assert outcome.scores["num_tokens"] == data.validation.layout.num_tokens
