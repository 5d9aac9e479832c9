"""Whole runs into which faults are injected: what is skipped, where training returns to, when it gives up."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_like.checkpoints import manager
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.data.batches import ShuffledBatches
from t5x_like.errors import UserError
from t5x_like.reporting.metrics import read_metrics
from t5x_like.sharding.mesh import MeshConfig
from t5x_like.training import loop
from t5x_like.training.guards import GuardConfig
from t5x_like.training.recovery import Fault, Recovery
from tests import toy
from tests.training.test_loop import trace, train
from tests.training.test_replicas import with_flipped_bit

EVERY_TWO = CheckpointConfig(save_every_steps=2)


@pytest.fixture
def directory(tmp_path):
    toy.write_text(tmp_path)
    return tmp_path


def poison(monkeypatch, is_bad):
    """Batches whose number `is_bad` weigh nan."""
    original = ShuffledBatches.batch

    def batch(self, number, rows=slice(None)):
        made = original(self, number, rows)
        if is_bad(number):
            made["decoder_loss_weights"] = np.full_like(made["decoder_loss_weights"], np.nan)
        return made

    monkeypatch.setattr(ShuffledBatches, "batch", batch)


def records(directory):
    return [r for r in read_metrics(directory / "run" / "metrics.jsonl") if r["split"] == "train"]


def test_one_bad_batch_costs_one_step_and_is_told(directory, monkeypatch, capsys):
    poison(monkeypatch, lambda number: number == 2)
    experiment = toy.experiment(directory)
    experiment = dataclasses.replace(
        experiment,
        run=dataclasses.replace(experiment.run, logging=dataclasses.replace(experiment.run.logging, progress=True)),
    )
    outcome = train(experiment)
    assert outcome.complete
    assert [int(r["skipped"]) for r in records(directory)] == [0, 0, 1, 1, 1, 1]
    assert np.isnan(records(directory)[2]["loss"])
    assert np.isfinite(outcome.scores["loss"])
    assert "skipped steps 1" in capsys.readouterr().err


def test_bad_batches_in_a_row_are_left_out_as_if_they_had_never_been(directory, monkeypatch):
    """Batches 4 and 5 are bad: back to the checkpoint of step 4, and on with batch 6. Also: a resumed run knows."""
    original = ShuffledBatches.batch
    guard = GuardConfig(rollback_after=2)
    poison(monkeypatch, lambda number: number in (4, 5))
    experiment = toy.experiment(directory, steps=10, guard=guard, checkpoints=EVERY_TWO)
    rolled_back = train(experiment)
    [rollback] = json.loads((directory / "run" / "rollbacks.json").read_text())
    assert rollback == {
        "to_step": 4,
        "skipped_batches": 2,
        "reason": "at step 6, 2 steps in a row were skipped",
    }
    assert [r["step"] for r in records(directory)] == list(range(1, 11))
    assert [r.get("rollbacks") for r in records(directory)] == [None] * 4 + [1] * 6

    (directory / "clean").mkdir()
    toy.write_text(directory / "clean")
    left_out = lambda self, number, rows=slice(None): original(self, number + 2 * (number >= 4), rows)
    monkeypatch.setattr(ShuffledBatches, "batch", left_out)
    clean = toy.experiment(directory / "clean", steps=10, guard=guard, checkpoints=EVERY_TWO)
    expected = train(clean)
    assert trace(experiment) == trace(clean)
    jax.tree.map(np.testing.assert_array_equal, rolled_back.state.params, expected.state.params)
    assert Recovery(directory / "run" / "rollbacks.json", guard).batch_number(7) == 9


def test_before_the_first_checkpoint_training_begins_again_past_the_bad_data(directory, monkeypatch):
    poison(monkeypatch, lambda number: number < 3)
    outcome = train(toy.experiment(directory, guard=GuardConfig(rollback_after=2)))
    assert outcome.complete
    assert int(outcome.state.guard.skipped) == 1
    assert json.loads((directory / "run" / "rollbacks.json").read_text())[0]["to_step"] == 0


def test_a_poisoned_source_stops_the_run_with_a_report_of_the_data(directory, monkeypatch):
    poison(monkeypatch, lambda number: number >= 4)
    experiment = toy.experiment(
        directory, steps=12, guard=GuardConfig(rollback_after=2, max_rollbacks=2), checkpoints=EVERY_TWO
    )
    with pytest.raises(
        UserError, match="After 2 returns to step 4, training fails again: at step 6, 2 steps"
    ) as stopped:
        train(experiment)
    # Two batches at a time: 4 and 5, 6 and 7, then 8 and 9.
    path = directory / "run" / "bad_batch_8.json"
    assert str(path) in str(stopped.value)
    report = json.loads(path.read_text())
    assert report["first bad step"] == 5
    assert report["data"].startswith("batches 8 to 9 of TextSource(files=")
    assert len(report["rows"]) == toy.BATCH
    row = report["rows"][0]["decoder_target_tokens"]
    assert row["text"] in (directory / "text.txt").read_text()
    assert len(row["tokens"]) == toy.LENGTH
    # The state of step 4 is still there, and the same command stops at once in the same way.
    with pytest.raises(UserError, match="After 2 returns to step 4"):
        train(experiment)


def test_a_device_that_computes_wrongly_is_named_and_its_work_undone(directory, monkeypatch, caplog):
    mesh = MeshConfig(data=2)
    guard = GuardConfig(compare_replicas_every_steps=1)
    (directory / "whole").mkdir()
    toy.write_text(directory / "whole")
    whole = toy.experiment(directory / "whole", mesh=mesh, guard=guard, checkpoints=EVERY_TWO)
    expected = train(whole, devices=2)

    compiled, steps = loop.compile_step, []

    def with_one_flip(job):
        step = compiled(job)

        def faulty(state, batch):
            state, metrics = step(state, batch)
            steps.append(0)
            if len(steps) == 3:
                embedding = with_flipped_bit(state.params["embedding"], jax.devices()[1])
                state = state._replace(params={**state.params, "embedding": embedding})
            return state, metrics

        return faulty

    monkeypatch.setattr(loop, "compile_step", with_one_flip)
    monkeypatch.setattr(loop.jax, "transfer_guard", lambda level: jax.transfer_guard_device_to_host("allow"))
    experiment = toy.experiment(directory, mesh=mesh, guard=guard, checkpoints=EVERY_TWO)
    outcome = train(experiment, devices=2)
    assert "At step 3, copies of parameters differ: embedding on cpu device 0 of process 0, cpu device 1" in caplog.text
    assert "back to step 2." in caplog.text
    assert trace(experiment) == trace(whole)
    jax.tree.map(np.testing.assert_array_equal, outcome.state.params, expected.state.params)


def test_an_evaluation_that_fails_stops_nothing(directory, monkeypatch):
    def broken(*args):
        def validate(params):
            raise RuntimeError("no memory")

        return validate

    monkeypatch.setattr(loop, "make_validation", broken)
    outcome = train(toy.experiment(directory, evaluate_every_steps=2))
    assert outcome.complete
    assert outcome.scores is None
    assert [r.get("failed_evaluations") for r in records(directory)] == [None, None, 1, 1, 2, 2]


def test_a_full_disk_stops_nothing_and_is_shown(directory, monkeypatch):
    full = manager.shutil.disk_usage(directory)._replace(free=0)
    calls = []

    def disk_usage(path):
        calls.append(path)
        return full if len(calls) <= 4 else full._replace(free=10**12)

    monkeypatch.setattr(manager.shutil, "disk_usage", disk_usage)
    waits = CheckpointConfig(save_every_steps=2, asynchronous=False)
    outcome = train(toy.experiment(directory, steps=8, checkpoints=waits))
    assert outcome.complete
    assert [r.get("failed_saves") for r in records(directory)] == [None, None, 1, 1, 2, 2, None, None]
    assert sorted(path.name for path in (directory / "run" / "checkpoints").iterdir()) == ["6", "8"]


def test_a_damaged_newest_checkpoint_is_set_apart_and_the_run_ends_the_same(directory):
    experiment = toy.experiment(directory, steps=6, checkpoints=EVERY_TWO)
    expected = train(experiment)
    before = trace(experiment)
    newest = directory / "run" / "checkpoints" / "6"
    [data] = [path for path in newest.rglob("d/*") if "process_0" in str(path)]
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 1
    data.write_bytes(content)
    outcome = train(experiment)
    assert outcome.reason == "complete at step 6"
    assert trace(experiment) == before
    jax.tree.map(np.testing.assert_array_equal, outcome.state.params, expected.state.params)
    assert (directory / "run" / "checkpoints" / "6.damaged").exists()


def test_the_file_of_rollbacks_decides_which_batch_a_step_takes(tmp_path):
    path = tmp_path / "rollbacks.json"
    entries = [
        {"to_step": 10, "skipped_batches": 5, "reason": "a"},
        {"to_step": 20, "skipped_batches": 3, "reason": "b"},
    ]
    path.write_text(json.dumps(entries))
    recovery = Recovery(path, GuardConfig())
    assert [recovery.batch_number(step) for step in (0, 9, 10, 19, 20, 30)] == [0, 9, 15, 24, 28, 38]


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '[{"to_step": 1}]', '[{"to_step": "a", "skipped_batches": 1, "reason": ""}]', "[" * 10**5],
)
def test_a_damaged_file_of_rollbacks_is_refused(tmp_path, content):
    path = tmp_path / "rollbacks.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"rollbacks.json is damaged .*Bring it back, or remove it"):
        Recovery(path, GuardConfig())


def test_few_skipped_steps_are_no_fault(tmp_path):
    recovery = Recovery(tmp_path / "rollbacks.json", GuardConfig(rollback_after=3))
    recovery.check(7, {"skipped_in_a_row": 2.0})
    recovery.check(7, {})
    with pytest.raises(Fault) as fault:
        recovery.check(7, {"skipped_in_a_row": 3.0})
    assert fault.value.bad_steps == range(4, 7)
