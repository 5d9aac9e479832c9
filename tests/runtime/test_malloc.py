import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from t5x_like.runtime.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for repetition in range(5):
    if repetition == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(10_000_000).sum()  # 80 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_large_buffer_is_faulted_in_once_only():
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", PROGRAM, mode], text=True))
        for mode in ("keep", "plain")
    }
    num_pages = 3 * 80_000_000 // resource.getpagesize()
    assert faults["keep"] < num_pages / 100
    assert faults["plain"] > faults["keep"]
