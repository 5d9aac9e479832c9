import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.reporting.goodput import CAUSES, Goodput, seconds_since_process_start


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def goodput(path, clock, **options):
    return Goodput(path, clock=clock, **{"wall_clock": lambda: clock.now, **options})


def spend(clock, goodput, cause, seconds):
    with goodput.during(cause):
        clock.now += seconds


def test_every_second_has_one_cause(tmp_path, clock):
    account = goodput(tmp_path / "goodput.json", clock, seconds_before=2.0)
    clock.now += 1
    spend(clock, account, "compile", 4)
    account.enter("step")
    clock.now += 10
    account.waited(3.0)
    with account.during("evaluate"):
        clock.now += 2
        spend(clock, account, "save", 1)
        clock.now += 1
    clock.now += 5
    account.write(ended=True)
    record = json.loads((tmp_path / "goodput.json").read_text())
    assert {cause: seconds for cause, seconds in record["seconds"].items() if seconds} == {
        "init": 3.0,
        "compile": 4.0,
        "step": 12.0,
        "data_wait": 3.0,
        "evaluate": 3.0,
        "save": 1.0,
    }
    assert record["goodput"] == round(12 / 26, 4)
    assert account.describe() == (
        "Time: 0:26: training steps 46.2%, compiling 15.4%, waiting for data 11.5%, starting up 11.5%, "
        "evaluating 11.5%, saving 3.8%."
    )


def test_a_kill_costs_the_downtime_and_the_steps_since_the_checkpoint(tmp_path, clock):
    path = tmp_path / "goodput.json"
    first = goodput(path, clock)
    first.enter("step")
    clock.now += 50
    first.saved(5)
    clock.now += 30
    first.write()
    clock.now += 20  # Killed, and started again after so long.
    second = goodput(path, clock, seconds_before=4.0)
    second.resumed(5)
    assert second.starts == 2
    assert {cause: seconds for cause, seconds in second.seconds.items() if seconds} == {
        "step": 50.0,
        "lost": 30.0,
        "restart": 16.0,
        "init": 4.0,
    }
    assert "in 2 starts" in second.describe()


def test_a_rollback_loses_the_steps_since_the_checkpoint_it_returns_to(tmp_path, clock):
    account = goodput(tmp_path / "goodput.json", clock)
    account.enter("step")
    for step, seconds in ((1, 10), (2, 10), (3, 10)):
        clock.now += seconds
        account.saved(step)
    clock.now += 5
    account.resumed(2)
    assert (account.seconds["step"], account.seconds["lost"]) == (20.0, 15.0)
    account.resumed(0)
    assert (account.seconds["step"], account.seconds["lost"]) == (0.0, 35.0)


def test_an_ended_run_was_not_down_and_a_clock_set_back_counts_nothing(tmp_path, clock):
    path = tmp_path / "goodput.json"
    goodput(path, clock).write(ended=True)
    clock.now += 1000
    assert goodput(path, clock).seconds["restart"] == 0
    first = goodput(path, clock)
    clock.now += 6
    first.write()
    assert goodput(path, clock, wall_clock=lambda: 5.0).seconds["restart"] == 0


def test_writing_is_rare_left_to_one_process_and_never_fatal(tmp_path, clock, caplog):
    account = goodput(tmp_path / "a.json", clock)
    account.write()
    before = (tmp_path / "a.json").read_text()
    account.enter("step")
    account.write()
    assert (tmp_path / "a.json").read_text() == before, "not again within seconds"
    goodput(tmp_path / "b.json", clock, writes=False).write(ended=True)
    assert not (tmp_path / "b.json").exists()
    goodput(tmp_path / "missing" / "c.json", clock).write(ended=True)
    assert "could not be written" in caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(
    st.binary(max_size=100)
    | st.dictionaries(st.sampled_from(["seconds", "marks", "time", "starts", "ended"]), JSON).map(
        lambda record: json.dumps(record).encode()
    )
)
def test_a_damaged_file_starts_anew(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "goodput.json"
    path.write_bytes(content)
    account = Goodput(path)
    account.resumed(3)
    assert set(account.seconds) == set(CAUSES)


def test_the_age_of_this_process_is_known():
    assert 0 < seconds_since_process_start() < 24 * 3600
