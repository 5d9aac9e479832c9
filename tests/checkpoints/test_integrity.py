import json
import random
import zlib

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.checkpoints import integrity
from t5x_like.checkpoints.integrity import damage, is_complete, write_checksums
from t5x_like.checkpoints.manager import CheckpointConfig, Checkpoints

MARK = "checksums-0-of-1.json"


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "state" / "ocdbt.process_0").mkdir(parents=True)
    (tmp_path / "state" / "ocdbt.process_1" / "d").mkdir(parents=True)
    (tmp_path / "state" / "ocdbt.process_1" / "d" / "x").write_bytes(b"of process 1")
    (tmp_path / "state" / "ocdbt.process_0" / "x").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty").touch()
    return epath.Path(tmp_path)


def test_every_flipped_byte_at_a_thousand_places_of_a_real_checkpoint_is_found(tmp_path):
    """Positions over all files, weighted by file rather than by size, so that the small ones are covered too."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state = {"params": {f"layer_{i}": jax.random.normal(jax.random.key(i), (64, 16)) for i in range(4)}}
    checkpoints.save(7, state, metrics={"loss": 1.0}, manifest={"data": "abc"}, force=True)
    files = [path for path in (tmp_path / "7").rglob("*") if path.is_file() and path.stat().st_size]
    contents = {path: path.read_bytes() for path in files}
    rng = random.Random(0)
    for number in range(1000):
        path = files[number % len(files)]
        changed = bytearray(contents[path])
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        assert checkpoints.verify(7), (path, number)
        path.write_bytes(contents[path])
    assert checkpoints.verify(7) == []


def test_checksums_are_those_of_zlib(directory, monkeypatch):
    monkeypatch.setattr(integrity, "PIECE", 1000)
    monkeypatch.setattr(integrity, "READ", 300)
    write_checksums(directory)
    files = json.loads((directory / MARK).read_text())["files"]
    content = (directory / "state" / "ocdbt.process_0" / "x").read_bytes()
    pieces = [zlib.crc32(content[start : start + 1000]) for start in range(0, len(content), 1000)]
    assert files["state/ocdbt.process_0/x"] == {"bytes": 5120, "crc32": pieces}
    assert files["empty"] == {"bytes": 0, "crc32": []}
    assert damage(directory) == []


def test_each_process_marks_its_own_files(directory):
    write_checksums(directory, 1, 2)
    assert not is_complete(directory)
    assert "checksums-0-of-2.json is missing" in damage(directory)
    write_checksums(directory, 0, 2)
    assert is_complete(directory)
    owned = [set(json.loads((directory / f"checksums-{i}-of-2.json").read_text())["files"]) for i in range(2)]
    assert owned == [{"empty", "state/ocdbt.process_0/x"}, {"state/ocdbt.process_1/d/x"}]
    # However many processes restore, one of them reads the damaged file.
    (directory / "state" / "ocdbt.process_1" / "d" / "x").write_bytes(b"of process 2")
    for count in (1, 2, 3, 5):
        found = [line for process in range(count) for line in damage(directory, process, count)]
        assert found == ["state/ocdbt.process_1/d/x is not what was written"]


def test_a_file_that_grew_is_found(directory):
    write_checksums(directory)
    (directory / "empty").write_bytes(b"x")
    assert damage(directory) == ["empty has 1 bytes of 0"]


def test_an_unknown_file_beside_is_no_damage(directory):
    write_checksums(directory)
    (directory / ".DS_Store").write_bytes(b"x")
    assert damage(directory) == []


NAMES = st.sampled_from(["files", "crc32", "bytes", "a"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
)


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_at_all_for_a_mark_is_damage_and_no_crash(tmp_path_factory, content):
    directory = epath.Path(tmp_path_factory.mktemp("fuzz"))
    (directory / MARK).write_bytes(content)
    assert damage(directory) == [f"{MARK} is damaged"]


def test_a_mark_cannot_point_outside(directory):
    """Paths in a mark are only ever compared and read, but a crafted one must not reach other files either."""
    write_checksums(directory)
    secret = directory.parent / "secret"
    secret.write_text("x")
    crafted = {"../secret": {"bytes": 1, "crc32": [zlib.crc32(b"x")]}}
    (directory / MARK).write_text(integrity._text(crafted))
    assert damage(directory) == [f"{MARK} is damaged"]


def test_arrays_of_every_size_survive(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state = {"scalar": jnp.float32(1), "many pieces": jnp.ones((5, 5 * 2**20), jnp.bfloat16)}
    checkpoints.save(1, state, force=True)
    assert checkpoints.verify(1) == []
