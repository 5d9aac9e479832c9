import os
import shutil
import threading

import numpy as np
import pytest

from t5x_like.files import InUseError, fingerprint, locked, new_directory, new_file, write_atomic


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "config.json"
    contents = ["a" * 200_000, "b" * 300_000]
    write_atomic(path, contents[0])
    writer = threading.Thread(target=lambda: [write_atomic(path, contents[i % 2].encode()) for i in range(50)])
    writer.start()
    while writer.is_alive():
        assert path.read_text() in contents
    writer.join()
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_a_new_file_or_directory_is_there_when_its_block_ends_well(tmp_path):
    with new_file(tmp_path / "a.npy") as aside:
        np.save(aside, [1, 2])
        assert not (tmp_path / "a.npy").exists()
    assert np.load(tmp_path / "a.npy").tolist() == [1, 2]
    with new_directory(tmp_path / "b" / "c") as work:
        (work / "x").touch()
        assert not (tmp_path / "b" / "c").exists()
    assert os.listdir(tmp_path / "b" / "c") == ["x"]


def test_a_failure_leaves_neither_the_new_one_nor_a_leftover(tmp_path):
    (tmp_path / "old").write_text("old")
    for make in (new_file, new_directory):
        with pytest.raises(KeyError), make(tmp_path / "new"):
            raise KeyError
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "old") as aside:
        aside.write_text(f"new {1 / 0}")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_directory_that_came_into_being_meanwhile_is_kept(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").touch()
    with pytest.raises(OSError, match="not empty"), new_directory(tmp_path / "a"):
        shutil.copytree(theirs, tmp_path / "a")
    assert os.listdir(tmp_path / "a") == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["a", "theirs"]


def test_a_lock_has_one_holder_and_names_it(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "lock"):
            refusal = pytest.raises(InUseError, match=rf"process {os.getpid()} on \S+")
            with refusal, locked(tmp_path / "lock"):
                pass


def test_fingerprints_are_of_the_content():
    assert fingerprint("a") == fingerprint(b"a") == "27c35e6e9373877f29e562464e46497e"
    assert fingerprint("a", size=8) == "40f89e395b66422f"
