import json

import pytest
from rich.console import Console

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.errors import UserError
from t5x_like.planning.compare import Measured, comparison, measured, topology_name
from t5x_like.runtime.versions import versions


def write_run(directory, records, kind="TPU v5p", count=64):
    directory.mkdir(exist_ok=True)
    (directory / "operative_config.gin").write_text("")
    config = {"devices": {"kind": kind, "count": count}, "versions": versions()}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def record(step, seconds, split="train"):
    return {"step": step, "split": split, "seconds_per_step": seconds, "waiting_for_data": 0.01, "mfu": 0.5}


def test_the_median_of_all_records_but_the_first(tmp_path):
    run = write_run(
        tmp_path, [record(1, 99.0), *(record(n, n) for n in (2, 3, 10)), {"step": 10, "split": "validation"}]
    )
    assert measured(RunDirectory(run)) == Measured("TPU v5p", 64, 3, 3, 0.01, 0.5)


def test_too_few_records(tmp_path):
    with pytest.raises(UserError, match="fewer than two records"):
        measured(RunDirectory(write_run(tmp_path, [record(1, 2.0)])))
    with pytest.raises(UserError, match="holds no run"):
        measured(RunDirectory(tmp_path / "none"))


@pytest.mark.parametrize(
    ("kind", "count", "name"),
    [
        ("TPU v5", 64, "v5p:4x4x4"),
        ("TPU v5 lite", 16, "v5e:4x4"),
        ("TPU v6 lite", 256, "v6e:16x16"),
        ("TPU7x", 8, "v7x:2x2x1"),
        ("NVIDIA H200", 1, "h200:1"),
        ("NVIDIA H100 80GB HBM3", 128, "h100:8x16"),
        ("cpu", 4, "cpu:4"),
    ],
)
def test_the_topology_of_a_run(kind, count, name):
    assert topology_name(Measured(kind, count, 1.0, 2, 0.0, None)) == name


def test_an_unknown_device_is_named():
    with pytest.raises(UserError, match="8 devices of kind 'TPU v2'"):
        topology_name(Measured("TPU v2", 8, 1.0, 2, 0.0, None))


def test_prediction_and_measurement_side_by_side(tpu_plan):
    seen = Measured("TPU v5p", 8, 2 * tpu_plan.seconds, 5, 0.02, tpu_plan.mfu / 2)
    console = Console(width=100, record=True)
    console.print(comparison(tpu_plan, seen))
    lines = {line.split("  ")[0]: line for line in console.export_text().splitlines()}
    assert lines["step"].rstrip().endswith("2.00")
    assert lines["tokens per second"].rstrip().endswith("0.50")
    assert lines["MFU"].rstrip().endswith("0.50")
