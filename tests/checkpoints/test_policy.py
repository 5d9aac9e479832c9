import pytest

from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.errors import UserError


def records(minutes):
    return {step: {"metrics": {}, "manifest": {}, "time": 60.0 * at} for step, at in minutes.items()}


def test_every_kth_checkpoint_stays():
    config = CheckpointConfig(save_every_steps=10, keep_last=2, keep_every_steps=30)
    assert config.kept(records({step: step for step in (10, 20, 30, 35, 40, 50, 60, 70, 75)})) == {30, 60, 70, 75}


def test_checkpoints_an_hour_apart_stay_whichever_were_pruned_before():
    config = CheckpointConfig(keep_last=1, keep_every_minutes=60)
    alive = set()
    for step in range(1, 40):  # A checkpoint each 7 minutes.
        alive = config.kept(records({old: 7 * old for old in {*alive, step}}))
    assert alive == {1, 10, 19, 28, 37, 39}


def test_a_clock_set_back_stops_no_keeping():
    config = CheckpointConfig(keep_last=1, keep_every_minutes=60)
    times = {1: 1000, 2: 1070, 3: 10, 4: 30, 5: 75, 6: 80}
    assert config.kept(records(times)) == {1, 2, 3, 5, 6}


def test_keeping_what_is_never_saved_is_refused():
    with pytest.raises(UserError, match=r"keep_every_steps \(25\) is no multiple of save_every_steps \(10\)"):
        CheckpointConfig(save_every_steps=10, keep_every_steps=25)
