"""The picture of losses: written whole, for runs of any length."""

import json
import math
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from t5x_like.reporting.plots import plot_losses, smoothed


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def train(step, loss):
    return {"step": step, "split": "train", "loss": loss}


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize(
    "records",
    [
        [train(1, 4.2)],
        [{"step": 5, "split": "validation", "loss": 4.2, "accuracy": 0.1}],
        [train(step, 4.0 - 3 * step / 100) for step in range(1, 101)]
        + [{"step": 100, "split": "validation", "loss": 2}],
        [train(1, 4.0), train(2, None), train(3, 0.0), {"step": 3, "split": "train", "grad_norm": 1.0}],
    ],
    ids=["one record", "validation alone", "both", "losses that no logarithm takes"],
)
def test_a_picture_is_drawn(tmp_path, records):
    plot_losses(write(tmp_path / "metrics.jsonl", records), tmp_path / "loss.png")
    image = pixels(tmp_path / "loss.png")
    assert image.shape[:2] == (540, 960)
    assert image[..., :3].min() < 0.5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_new_record_changes_the_picture(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [train(1, 4.0), train(2, 3.0)])
    plot_losses(path, tmp_path / "loss.png")
    before = pixels(tmp_path / "loss.png")
    plot_losses(write(path, [train(1, 4.0), train(2, 3.0), train(3, 1.0)]), tmp_path / "loss.png")
    assert not np.array_equal(before, pixels(tmp_path / "loss.png"))


def test_without_losses_nothing_is_written(tmp_path):
    plot_losses(write(tmp_path / "metrics.jsonl", [train(1, math.nan)]), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_pyplot_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_losses(write(tmp_path / "metrics.jsonl", [train(1, 4.2)]), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_smoothing_is_gaussian():
    losses = np.random.default_rng(0).normal(size=400)
    expected = gaussian_filter1d(losses, sigma=4.0, truncate=3.0)
    np.testing.assert_allclose(smoothed(losses)[12:-12], expected[12:-12], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 49, 50])
def test_smoothing_keeps_short_and_constant_runs(count):
    np.testing.assert_allclose(smoothed(np.full(count, 2.5)), 2.5)
    assert smoothed(np.array([3.0, 1.0]))[0] == 3.0
