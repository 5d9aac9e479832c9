"""The shipped runs are what they were: a change of a default shows as a difference to a file."""

import json

import pytest

from t5x_like.configurable import difference
from tests.config.rewrite_goldens import GOLDENS, RUNS, resolved

REWRITE = "if this is meant, run `python -m tests.config.rewrite_goldens` and commit the difference"


def test_every_shipped_run_has_a_golden():
    assert sorted(path.stem for path in GOLDENS.glob("*.json")) == RUNS, REWRITE


@pytest.mark.parametrize("run", RUNS)
def test_a_shipped_run_is_what_it_was(run):
    golden = (GOLDENS / f"{run}.json").read_text()
    lines = difference(json.loads(golden), json.loads(resolved(run)))
    assert not lines, f"{REWRITE}: " + "; ".join(lines)
