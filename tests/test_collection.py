"""What is collected does not depend on when, nor on the order of sets: pytest-xdist compares what its workers found."""

import os
import subprocess
import sys
import time
from pathlib import Path


def test_two_collections_seconds_apart_with_other_hash_seeds_are_equal():
    def start(seed: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "tests"]
        return subprocess.Popen(
            [*command, "-o", "addopts=--import-mode=importlib", "--verbosity=-1"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )

    first = start("1")
    time.sleep(1.5)
    second = start("2")
    collected = [process.communicate(timeout=300)[0].splitlines() for process in (first, second)]
    assert len(collected[0]) > 2000
    different = set(collected[0]) ^ set(collected[1])
    assert not {line for line in different if "::" in line}
    # The order counts too.
    assert [line for line in collected[0] if "::" in line] == [line for line in collected[1] if "::" in line]
