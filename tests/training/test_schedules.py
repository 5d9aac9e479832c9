"""Schedules against the formulas of nanoGPT, T5 and the papers, evaluated in plain Python."""

import math

import jax
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.training import schedules

PEAK, WARMUP, STEPS = 1e-3, 10, 50


def nanogpt_cosine(it, learning_rate=PEAK, warmup_iters=WARMUP, lr_decay_iters=STEPS, min_lr=1e-4):
    """`get_lr` of nanoGPT's train.py."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


def progress(step):
    return min(1.0, (step - WARMUP) / (STEPS - WARMUP))


CURVES = {
    "constant": (schedules.ConstantSchedule(learning_rate=PEAK, warmup_steps=WARMUP), lambda step: PEAK),
    "linear": (
        schedules.LinearSchedule(learning_rate=PEAK, warmup_steps=WARMUP, final_fraction=0.2),
        lambda step: PEAK * (1 - 0.8 * progress(step)),
    ),
    "cosine": (schedules.CosineSchedule(learning_rate=PEAK, warmup_steps=WARMUP), nanogpt_cosine),
    "inverse_square_root": (
        schedules.InverseSquareRootSchedule(learning_rate=PEAK, warmup_steps=WARMUP),
        lambda step: PEAK * math.sqrt(WARMUP + 1) / math.sqrt(step + 1),
    ),
    "exponential": (
        schedules.ExponentialSchedule(learning_rate=PEAK, warmup_steps=WARMUP, final_fraction=0.01),
        lambda step: PEAK * math.exp(math.log(0.01) * progress(step)),
    ),
    "step": (
        schedules.StepSchedule(learning_rate=PEAK, warmup_steps=WARMUP, boundaries=(20, 40), factor=0.5),
        lambda step: PEAK * 0.5 ** ((step >= 20) + (step >= 40)),
    ),
    "warmup_stable_decay": (
        schedules.WarmupStableDecaySchedule(learning_rate=PEAK, warmup_steps=WARMUP, final_fraction=0.1),
        lambda step: PEAK * (1 - 0.9 * min(1.0, max(0.0, (step - 40) / 10))),
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_curve(name):
    config, curve = CURVES[name]
    steps = range(STEPS + 5)
    expected = [PEAK * (step + 1) / (WARMUP + 1) if step < WARMUP else curve(step) for step in steps]
    np.testing.assert_allclose(jax.vmap(config.build(STEPS))(np.arange(STEPS + 5)), expected, rtol=1e-5)


@pytest.mark.parametrize("config", [schedules.CosineSchedule, schedules.InverseSquareRootSchedule])
def test_without_warmup_the_first_rate_is_the_peak(config):
    assert config(learning_rate=PEAK).build(STEPS)(0) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", CURVES)
def test_warmup_longer_than_the_run_is_refused(name):
    with pytest.raises(UserError, match=r"warmup_steps \(10\) is longer than the run \(9 steps\)"):
        CURVES[name][0].build(9)


def test_a_run_of_warmup_alone_ends_below_the_peak():
    schedule = schedules.CosineSchedule(learning_rate=PEAK, warmup_steps=WARMUP).build(WARMUP)
    assert schedule(WARMUP - 1) == pytest.approx(PEAK * WARMUP / (WARMUP + 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.ConstantSchedule(learning_rate=0.0), "learning_rate must be positive, not 0.0"),
        (lambda: schedules.LinearSchedule(learning_rate=1.0, warmup_steps=-1), "warmup_steps must not be negative"),
        (lambda: schedules.CosineSchedule(learning_rate=1.0, final_fraction=1.5), "final_fraction .* not 1.5"),
        (lambda: schedules.ExponentialSchedule(learning_rate=1.0, final_fraction=0.0), "must not be 0"),
        (lambda: schedules.StepSchedule(learning_rate=1.0, boundaries=(4, 4)), "increasing steps"),
        (lambda: schedules.StepSchedule(learning_rate=1.0, boundaries=(50,)).build(50), "beyond the run"),
        (
            lambda: schedules.WarmupStableDecaySchedule(learning_rate=1.0, warmup_steps=45).build(50),
            "do not fit into the run",
        ),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
