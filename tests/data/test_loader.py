import threading
import time

import jax
import numpy as np
import pytest

from t5x_like.data.loader import Loader, device_prefetch


def make(step):
    time.sleep(0.001 * (step % 3))
    return {"x": np.full((2,), step)}


@pytest.mark.parametrize("num_threads", [1, 4])
def test_steps_come_in_order(num_threads):
    with Loader(make, 5, 20, num_threads=num_threads) as loader:
        items = list(loader)
    assert [step for step, _ in items] == list(range(5, 25))
    assert [int(batch["x"][0]) for _, batch in items] == list(range(5, 25))


def test_no_steps():
    with Loader(make, 5, 0) as loader:
        assert list(loader) == []


def test_waiting_is_measured():
    with Loader(lambda step: time.sleep(0.05), 0, 3, num_threads=1) as slow:
        list(slow)
    assert slow.seconds_waited > 0.1
    with Loader(lambda step: step, 0, 3) as fast:
        next(fast)
        time.sleep(0.1)
        waited = fast.seconds_waited
        list(fast)
    assert fast.seconds_waited - waited < 0.05


def test_errors_of_a_batch_arrive_and_close_ends_the_threads():
    def fail(step):
        if step == 2:
            raise ValueError("bad step")
        return step

    before = threading.active_count()
    loader = Loader(fail, 0, 100)
    assert next(loader) == (0, 0)
    assert next(loader) == (1, 1)
    for _ in range(2):  # A batch that failed is not passed over.
        with pytest.raises(ValueError, match="bad step"):
            next(loader)
    loader.close()
    deadline = time.time() + 5
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_close_before_the_end_of_a_long_run():
    made = []
    loader = Loader(lambda step: made.append(step), 0, 10**9, num_prefetched=3)
    assert next(loader)[0] == 0
    loader.close()
    assert list(loader) == []
    assert len(made) <= 4


def test_no_more_batches_are_made_than_are_asked_for_ahead():
    made = []
    with Loader(lambda step: made.append(step), 0, 100, num_prefetched=5) as loader:
        for step in range(3):
            next(loader)
            deadline = time.time() + 5
            while len(made) < 6 + step and time.time() < deadline:
                time.sleep(0.001)
            assert sorted(made) == list(range(6 + step))


def test_device_prefetch_puts_ahead():
    put = []

    def to_device(batch):
        put.append(int(batch["x"][0]))
        return jax.device_put(batch)

    with Loader(make, 0, 6) as loader:
        ahead = []
        for step, batch in device_prefetch(loader, to_device, depth=2):
            assert isinstance(batch["x"], jax.Array)
            assert int(batch["x"][0]) == step
            ahead.append(put[-1] - step)
    assert ahead == [2, 2, 2, 2, 1, 0]
