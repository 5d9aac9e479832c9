import faulthandler
import subprocess
import sys
import time

import pytest

from t5x_like.training.watchdog import Watchdog

HANGS = """
import threading, time
from t5x_like.training.watchdog import Watchdog
def waits_for_a_peer():
    {hang}
with Watchdog(0.6 / 60) as watchdog:
    for _ in range(4):
        watchdog.progress()
        time.sleep(0.2)
    print("still here", flush=True)
    threading.Thread(target=time.sleep, args=(30,), name="other").start()
    waits_for_a_peer()
"""
WITH_THE_INTERPRETER_HELD = "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"


@pytest.mark.parametrize("hang", ["time.sleep(30)", WITH_THE_INTERPRETER_HELD], ids=["sleeps", "holds the interpreter"])
def test_a_hang_prints_all_stacks_and_ends_the_process(hang):
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", HANGS.format(hang=hang)], capture_output=True, text=True, timeout=60
    )
    assert process.stdout == "still here\n", "progress every 0.2 s is none"
    assert process.returncode == 1
    assert time.monotonic() - start < 25
    assert "Timeout (0:00:00.6" in process.stderr
    assert "waits_for_a_peer" in process.stderr
    assert process.stderr.count("Thread 0x") == 2


def test_without_a_limit_it_does_nothing(monkeypatch):
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **options: 1 / 0)
    with Watchdog(None) as watchdog:
        watchdog.progress()


def test_progress_of_fast_steps_costs_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **options: calls.append(args))
    with Watchdog(60.0) as watchdog:
        for _ in range(1000):
            watchdog.progress()
    assert calls == [(3600.0,)]
