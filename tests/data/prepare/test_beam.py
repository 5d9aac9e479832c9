import sys

import pytest

from t5x_like.data.prepare.beam import BeamEngine
from t5x_like.errors import UserError
from tests.data.corpora import make_corpus

RUNNER = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"


@pytest.mark.beam
def test_beam_makes_the_same_corpus(tmp_path):
    pytest.importorskip("apache_beam", reason="extra: beam")
    make_corpus(tmp_path / "local", 0)
    with BeamEngine([RUNNER]) as engine:
        make_corpus(tmp_path / "beam", 0, engine=engine)
    local, beam = (
        {p.name: p.read_bytes() for p in sorted((tmp_path / name / "out").rglob("*")) if p.is_file()}
        for name in ("local", "beam")
    )
    # The record has a hash of the input's path and time, the report has its path.
    for name in ("prepared.json", "report.json", "report.html"):
        assert local.pop(name)
        assert beam.pop(name)
    assert len(local) > 5
    assert local == beam


def test_beam_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 't5x_like\[beam\]'"):
        BeamEngine()
