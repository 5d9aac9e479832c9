"""Metrics: what stands in the file, after kills and with writers that fail."""

import json
import math
import resource
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
from absl import logging

from t5x_like.errors import UserError
from t5x_like.reporting import metrics
from t5x_like.reporting.metrics import METRICS_FILE, MetricsWriter, open_side_writers, read_metrics


def write_steps(directory, resumed_step, steps, **options):
    writer = MetricsWriter(directory, resumed_step=resumed_step, **options)
    for step in steps:
        writer.write(step, "train", {"loss": 1 / step})
        if step % 2 == 0:
            writer.write(step, "validation", {"loss": 2 / step})
    return writer


def test_records_are_in_the_file_at_once_and_in_full_precision(tmp_path):
    writer = MetricsWriter(tmp_path / "run", resumed_step=0)
    loss = np.float32(1 / 3)
    writer.write(10, "train", {"loss": loss, "num_tokens": 640, "grad_norm": np.float64(0.1)})
    line = (tmp_path / "run" / METRICS_FILE).read_text()
    assert line == '{"step": 10, "split": "train", "loss": 0.3333333432674408, "num_tokens": 640, "grad_norm": 0.1}\n'
    assert np.float32(json.loads(line)["loss"]) == loss
    writer.close()


def test_not_finite_numbers_are_null_in_the_file_and_nan_when_read(tmp_path):
    writer = MetricsWriter(tmp_path, resumed_step=0)
    writer.write(1, "train", {"loss": math.nan, "grad_norm": math.inf})
    assert '"loss": null, "grad_norm": null' in (tmp_path / METRICS_FILE).read_text()
    assert math.isnan(read_metrics(tmp_path / METRICS_FILE)[0]["loss"])


def test_a_killed_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole", 0, range(1, 9)).close()
    write_steps(tmp_path / "killed", 0, range(1, 7))
    path = tmp_path / "killed" / METRICS_FILE
    with path.open("a") as file:
        file.write('{"step": 7, "spl')
    assert len(read_metrics(path)) == 9
    write_steps(tmp_path / "killed", 4, range(5, 9)).close()
    assert path.read_text() == (tmp_path / "whole" / METRICS_FILE).read_text()
    assert [file.name for file in path.parent.iterdir()] == [METRICS_FILE]


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, resumed_step=0)
    writer.write(0, "validation", {"loss": 5.0})
    writer.close()
    write_steps(tmp_path, 0, [1]).close()
    assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"step": 1}', ""])
def test_other_files_are_refused_and_left_as_they_are(tmp_path, line):
    path = tmp_path / METRICS_FILE
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:1 is not a metrics record"):
        MetricsWriter(tmp_path, resumed_step=3)
    assert path.read_text() == line + "\n"


class FailingWriter:
    calls = 0

    def write(self, step, split, values):
        self.calls += 1
        raise ConnectionError("no route")

    def close(self):
        raise ConnectionError("still no route")


def test_a_failing_side_writer_is_tried_again_counted_and_stops_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    failing = FailingWriter()
    with caplog.at_level(logging.WARNING):
        writer = write_steps(tmp_path, 0, [1, 3, 5], side_writers={"Side": failing})
        writer.close()
    assert (failing.calls, writer.failures) == (9, 10)
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 3
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "Side failed (1 times so far), training goes on: ConnectionError('no route')"
    assert len(messages) == 4, "the first, second, fourth and eighth"


def test_a_side_writer_that_recovers_gets_the_record_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    written = []

    class Flaky:
        def write(self, step, split, values):
            if len(written) == 1 and not hasattr(self, "failed"):
                self.failed = True
                raise TimeoutError
            written.append(step)

        def close(self):
            written.append("closed")

    writer = write_steps(tmp_path, 0, [1, 3, 5], side_writers={"Side": Flaky()})
    writer.close()
    assert (written, writer.failures) == ([1, 3, 5, "closed"], 1)


def test_a_side_writer_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(metrics, "QUEUED_RECORDS", 2)
    release = threading.Event()
    hanging = types.SimpleNamespace(write=lambda *record: release.wait(60), close=lambda: None)
    start = time.monotonic()
    writer = write_steps(tmp_path, 0, [1, 3, 5, 7, 9], side_writers={"Side": hanging})
    writer.close()
    assert time.monotonic() - start < 5
    assert writer.failures >= 2, "records that found no room are counted"
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 5
    release.set()


def test_a_full_disk_loses_no_record(tmp_path):
    """The file may grow to 100 bytes, in the middle of the second record, until there is room again."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = MetricsWriter(tmp_path, resumed_step=0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for step in range(1, 5):
            writer.write(step, "train", {"loss": 1 / step})
        assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.failures == 2
    writer.write(5, "train", {"loss": 1 / 5})
    assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5]
    writer.close()


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writers = open_side_writers(tmp_path, resumed_step=0, tensorboard=True, wandb_project=None, config={})
    write_steps(tmp_path, 0, [1, 2], side_writers=writers).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, values = file.read_bytes(), []
    while data:
        # A TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4).
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        values += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert values == [("train/loss", 1, 1.0), ("train/loss", 2, 0.5), ("validation/loss", 2, 1.0)]


def test_wandb_that_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 't5x_like\[wandb\]'"):
        open_side_writers(tmp_path, resumed_step=0, tensorboard=False, wandb_project="p", config={})


def fake_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.init = init
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    inits, logs = [], []

    class Run:
        def log(self, values, step):
            logs.append((values, step))

        def finish(self):
            logs.append("finish")

    fake_wandb(monkeypatch, lambda **options: inits.append(options) or Run())
    for resumed_step, step in ((0, 1), (1, 3)):
        writers = open_side_writers(tmp_path, resumed_step=0, tensorboard=False, wandb_project="p", config={"seed": 1})
        write_steps(tmp_path, resumed_step, [step], side_writers=writers).close()
    assert logs == [({"train/loss": 1.0}, 1), "finish", ({"train/loss": 1 / 3}, 3), "finish"]
    assert inits[0] == inits[1]
    assert inits[0]["resume"] == "allow"
    assert len(inits[0]["id"]) == 32


def test_wandb_that_does_not_start_is_left_out(tmp_path, monkeypatch, caplog):
    def init(**options):
        raise ConnectionError("offline")

    fake_wandb(monkeypatch, init)
    assert open_side_writers(tmp_path, resumed_step=0, tensorboard=False, wandb_project="p", config={}) == {}
    assert "Weights & Biases did not start" in caplog.text
