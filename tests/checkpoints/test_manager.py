import contextlib
import json
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from t5x_like.checkpoints import manager
from t5x_like.checkpoints.integrity import write_checksums
from t5x_like.checkpoints.manager import CheckpointConfig, Checkpoints
from t5x_like.errors import UserError

ALWAYS = CheckpointConfig(save_every_steps=1, keep_last=100)


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict | None


def shardings(state, num_devices):
    mesh = jax.make_mesh((num_devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:num_devices])
    return jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec("data") if x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()),
        state,
    )


def make_state(seed=0, num_devices=8, width=4):
    """A state with every dtype that training has, its optimizer state included."""
    rng = np.random.default_rng(seed)
    params = {
        "decoder": {
            "kernel": jnp.asarray(rng.standard_normal((16, width)), jnp.float32),
            "scale": jnp.asarray(rng.standard_normal((8, 3)), jnp.bfloat16),
        },
        "odd": jnp.asarray(rng.standard_normal(7), jnp.float32).at[0].set(jnp.nan),
        "key": jnp.asarray(rng.integers(0, 2**32, 2, dtype=np.uint32)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(jnp.int32(seed), params, optimizer.init(params), None)
    return jax.device_put(state, shardings(state, num_devices))


def abstract(state, num_devices=8):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, num_devices)
    )


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_restores_every_bit_on_any_mesh(tmp_path, num_devices):
    state = make_state(seed=3)
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    checkpoints.save(3, state)
    checkpoints.close()
    target = abstract(state, num_devices)
    restored = Checkpoints(tmp_path, ALWAYS).restore(target)
    assert_same_bits(restored, state)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, t: x.sharding == t.sharding, restored, target)))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_reader_that_is_not_ours_sees_plain_nested_dicts(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    checkpoints.save(1, state, force=True)
    tree = ocp.load(tmp_path / "1")
    assert_same_bits(tree["params"], state.params)
    assert_same_bits(tree["opt_state"]["1"]["0"]["mu"], state.opt_state[1][0].mu)


def test_steps_may_donate_the_state_while_it_is_written(tmp_path):
    create = jax.jit(lambda: {f"array_{i}": jnp.full((256, 1024), i, jnp.float32) for i in range(8)})
    train_step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 100, tree), donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path, ALWAYS), create()
    for step in range(5):
        saved = state
        checkpoints.save(step, saved)
        state = train_step(saved)
        assert saved["array_1"].is_deleted(), "the step had to copy what the save holds"
    checkpoints.close()
    for step in range(5):
        restored = checkpoints.restore(jax.eval_shape(create), step)
        expected = {f"array_{i}": np.full((256, 1024), i + 100 * step, np.float32) for i in range(8)}
        assert_same_bits(restored, expected)


def test_the_schedules_of_steps_and_minutes(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(manager.time, "monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(save_every_steps=3, save_every_minutes=2))
    assert [step for step in range(1, 8) if checkpoints.due(step)] == [3, 6]
    now += 119
    assert not checkpoints.overdue()
    now += 1
    assert checkpoints.overdue()
    checkpoints.save(4, {"x": jnp.ones(2)}, force=True)
    assert not checkpoints.overdue()
    assert not Checkpoints(tmp_path, CheckpointConfig(save_every_minutes=None)).overdue()


def test_a_clock_set_back_or_forth_moves_no_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(save_every_minutes=1, keep_every_minutes=60, keep_last=1))
    for hours in (1e4, 0, 2e4):
        monkeypatch.setattr(manager.time, "time", lambda hours=hours: hours * 3600)
        assert not checkpoints.overdue()
        checkpoints.save(int(hours), {"x": jnp.ones(2)}, force=True)
    assert checkpoints.latest_step() == 20000


def test_a_synchronous_save_is_complete_on_return(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(save_every_steps=1, asynchronous=False))
    checkpoints.save(1, {"x": jnp.ones(2)})
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize(("mode", "best", "kept"), [("min", 3, [2, 3, 6, 7]), ("max", 5, [4, 5, 6, 7])])
def test_keeps_the_newest_and_the_best(tmp_path, mode, best, kept):
    config = CheckpointConfig(save_every_steps=1, keep_last=2, keep_best=2, best_mode=mode)
    checkpoints = Checkpoints(tmp_path, config)
    for step, loss in enumerate([float("nan"), 1.0, 0.5, 3.0, 4.0, None, None], start=1):
        checkpoints.save(step, {"x": jnp.ones(2)}, metrics=None if loss is None else {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (best, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


def test_manifest_and_metrics_come_back_with_their_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    manifests = [{"config": f"{i}", "versions": {"jax": jax.__version__}, "list": [1, None]} for i in range(2)]
    for step, manifest in enumerate(manifests):
        checkpoints.save(step, {"x": jnp.ones(2)}, metrics={"loss": jnp.float32(0.1)}, manifest=manifest)
    checkpoints.wait()
    assert [checkpoints.manifest(step) for step in (0, 1)] == manifests
    assert checkpoints.manifest() == manifests[1]
    assert checkpoints.metrics(0) == {"loss": float(np.float32(0.1))}


def test_restores_a_part_by_name(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    checkpoints.save(1, state, force=True)
    target = jax.eval_shape(lambda: {"params": state.params})  # No shardings: the first device.
    restored = checkpoints.restore(target, partial=True)
    assert_same_bits(restored["params"], state.params)
    assert restored["params"]["odd"].devices() == {jax.local_devices()[0]}
    assert {name[0] for name in checkpoints.arrays()} == {"step", "params", "opt_state"}
    with pytest.raises(UserError, match=r"opt_state/1/0/count: saved int32.., needed nothing"):
        checkpoints.restore(target)


def test_a_changed_model_is_refused_with_the_differences(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    checkpoints.save(1, make_state(width=4), force=True)
    with pytest.raises(UserError) as wider:
        checkpoints.restore(abstract(make_state(width=5)))
    message = str(wider.value)
    assert f"{tmp_path}/1 does not fit" in message
    assert "params/decoder/kernel: saved float32[16, 4], needed float32[16, 5]" in message
    assert "operative_config.gin" in message
    other = abstract(make_state())
    other.params["extra"] = other.params.pop("odd")
    other.params["key"] = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(UserError) as renamed:
        checkpoints.restore(other)
    for line in (
        "params/extra: saved nothing, needed float32[7]",
        "params/odd: saved float32[7], needed nothing",
        "params/key: saved uint32[2], needed int32[2]",
    ):
        assert line in str(renamed.value)


def test_a_missing_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", ALWAYS)
    assert checkpoints.steps() == []
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (None, None)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore({})
    assert not (tmp_path / "none").exists()
    for step in (1, 4):
        checkpoints.save(step, {"x": jnp.ones(2)}, force=True)
    with pytest.raises(UserError, match=r"no checkpoint of step 2 .* choose one of 1, 4"):
        checkpoints.restore({}, step=2)


KILLED_WHILE_SAVING = """
import sys, time
import jax.numpy as jnp
from t5x_like.checkpoints.manager import CheckpointConfig, Checkpoints
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(save_every_steps=1))
state = {f"array_{i}": jnp.full((1024, 1024), i, jnp.float32) for i in range(64)}
checkpoints.save(1, state)
checkpoints.wait()
checkpoints.save(2, state)
print("saving", flush=True)
time.sleep(60)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists(), "the kill came too late to test anything"
    # What a kill during the deletion of an old checkpoint leaves.
    (tmp_path / "0").mkdir()

    checkpoints = Checkpoints(tmp_path, ALWAYS)
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore({"array_5": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}, partial=True)
    assert (np.asarray(restored["array_5"]) == 5).all()
    checkpoints.save(2, {"x": jnp.ones(2)}, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.fixture
def small_files():
    """A function that limits the size of files that this process can write, or (None) lifts the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_failed_writes_are_reported_and_the_next_save_succeeds(tmp_path, caplog, small_files):
    state = {"x": jnp.arange(1 << 18, dtype=jnp.float32)}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(save_every_steps=1, keep_last=1))
    checkpoints.save(1, state, force=True)
    small_files(100_000)
    for failures, step in enumerate((2, 3), start=1):
        checkpoints.save(step, state)
        checkpoints.wait()
        assert checkpoints.failures == failures
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with pytest.raises(UserError, match=r"Step 4 could not be saved.*File too large.*continues from step 1"):
        checkpoints.save(4, state, force=True)
    small_files(None)
    assert_same_bits(checkpoints.restore(jax.eval_shape(lambda: state)), state)

    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3, "one message for each failure, and none of Orbax's tracebacks"
    assert "Step 2 could not be saved" in messages[0]
    assert "File too large" in messages[0]

    checkpoints.save(5, state)
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.failures) == ([5], 0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting needs more rights: {mounted.stderr.strip()}")
    yield place
    # Lazily: threads of a save may hold a file for a moment more.
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_small_disk_runs_full_and_is_used_again_when_there_is_room(small_disk, monkeypatch):
    state = {"x": jnp.arange(1 << 18, dtype=jnp.float32)}
    # The files of others take the room while we write.
    monkeypatch.setattr(Checkpoints, "_check_space", lambda self, state: None)
    checkpoints = Checkpoints(small_disk / "checkpoints", CheckpointConfig(keep_last=1))
    checkpoints.save(1, state, force=True)
    (small_disk / "others").write_bytes(bytes(1_500_000))
    for step in (2, 3):
        checkpoints.save(step, state)
        checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.failures) == ([1], 2)
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["1"], "what failed saves left is gone"
    assert_same_bits(checkpoints.restore(jax.eval_shape(lambda: state)), state)
    (small_disk / "others").unlink()
    checkpoints.save(4, state)
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.failures) == ([4], 0)
    checkpoints.close()


def test_room_is_made_of_damaged_checkpoints(small_disk):
    state = {"x": jnp.arange(1 << 18, dtype=jnp.float32)}
    checkpoints = Checkpoints(small_disk, CheckpointConfig(keep_last=1))
    for step in (1, 2):
        checkpoints.config = CheckpointConfig(keep_last=2)
        checkpoints.save(step, state, force=True)
    flip(small_disk / "2" / "_CHECKPOINT_METADATA")
    assert checkpoints.newest_good(quarantine=True) == 1
    checkpoints.save(3, state, force=True)
    assert sorted(path.name for path in small_disk.iterdir()) == ["1", "3"]
    checkpoints.close()


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    state = {"x": jnp.ones(1 << 20)}
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
    checkpoints.save(1, state)
    assert checkpoints.failures == 1
    with pytest.raises(UserError, match=r"needs 4\.2 MB and the disk has 4\.0 MB free.*from the start"):
        checkpoints.save(2, state, force=True)
    monkeypatch.undo()
    checkpoints.save(3, state, force=True)
    assert (checkpoints.steps(), checkpoints.failures) == ([3], 0)


def test_a_directory_that_cannot_be_made_does_not_stop_training(tmp_path):
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", ALWAYS)
    checkpoints.save(1, {"x": jnp.ones(2)})
    checkpoints.close()
    assert checkpoints.failures == 1


def test_a_save_leaves_the_caller_free_while_it_writes(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    finish = checkpoints._finish
    monkeypatch.setattr(checkpoints, "_finish", lambda *args: (time.sleep(1), finish(*args)))
    start = time.perf_counter()
    checkpoints.save(1, {"x": jnp.ones(2)})
    assert time.perf_counter() - start < 0.9
    checkpoints.save(2, {"x": jnp.ones(2)})
    assert checkpoints.steps()[0] == 1, "the second save waits for the first"
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    "field",
    ["save_every_steps", "save_every_minutes", "keep_last", "keep_best", "keep_every_steps", "keep_every_minutes"],
)
def test_senseless_configurations_are_refused(field):
    with pytest.raises(UserError, match=rf"CheckpointConfig\.{field} is -1"):
        CheckpointConfig(**{field: -1})


def test_the_record_is_json(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    checkpoints.save(1, {"x": jnp.ones(2)}, metrics={"loss": 1.5}, manifest={"a": "b"}, force=True)
    record = json.loads((tmp_path / "1" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert record.pop("time") == pytest.approx(time.time(), abs=60)
    assert record == {"metrics": {"loss": 1.5}, "manifest": {"a": "b"}}


def test_a_relative_path_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state()
    checkpoints = Checkpoints("run/checkpoints", CheckpointConfig())
    checkpoints.save(1, state, force=True)
    checkpoints.close()
    assert_same_bits(Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig()).restore(abstract(state)), state)


@pytest.fixture
def two_checkpoints(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path, ALWAYS)
    for step in (1, 2):
        checkpoints.save(step, state, force=True)
    checkpoints.close()
    return tmp_path, state


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, pathlib.Path.unlink], ids=["truncate", "flip", "remove"])
def test_any_harm_to_any_file_is_found_and_the_checkpoint_before_used(two_checkpoints, harm, caplog):
    directory, state = two_checkpoints
    whole = directory / "2"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) >= 9
    for file in files:
        if harm in (truncate, flip) and not (whole / file).stat().st_size:
            continue  # Nothing to flip.
        copy = directory.parent / f"{directory.name}-copy"
        shutil.copytree(directory, copy)
        harm(copy / "2" / file)
        caplog.clear()
        checkpoints = Checkpoints(copy, ALWAYS)
        assert checkpoints.newest_good() == 1, file
        assert (copy / "2").exists(), "readers change nothing"
        assert checkpoints.newest_good(quarantine=True) == 1, file
        assert "Checkpoint 2 is damaged" in caplog.text
        assert sorted(path.name for path in copy.iterdir()) == ["1", "2.damaged"]
        shutil.rmtree(copy)
    assert_same_bits(Checkpoints(directory, ALWAYS).restore(abstract(state)), state)


def test_a_removed_item_is_found(two_checkpoints):
    directory, _ = two_checkpoints
    shutil.rmtree(directory / "2" / "state")
    with pytest.raises(UserError, match=r"2 is damaged: state/\S+ is missing; .* and \d+ more. Choose another"):
        Checkpoints(directory, ALWAYS).check(2)
    assert Checkpoints(directory, ALWAYS).newest_good() == 1


def test_without_a_whole_checkpoint_nothing_is_restored(two_checkpoints):
    directory, state = two_checkpoints
    for step in (1, 2):
        flip(directory / str(step) / "state" / "_METADATA")
    with pytest.raises(UserError, match=r"All checkpoints in .* are damaged \(2, 1\): bring back"):
        Checkpoints(directory, ALWAYS).restore(abstract(state))


def test_a_checkpoint_killed_before_its_marks_is_none(two_checkpoints):
    """Also: the next save removes it."""
    directory, state = two_checkpoints
    for step in (1, 2):
        (directory / str(step) / "checksums-0-of-1.json").unlink()
    checkpoints = Checkpoints(directory, ALWAYS)
    assert (checkpoints.steps(), checkpoints.newest_good()) == ([], None)
    checkpoints.save(2, state, force=True)
    assert [path.name for path in directory.iterdir()] == ["2"]


def test_damaged_checkpoints_do_not_pile_up(tmp_path):
    state = {"x": jnp.ones(2)}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=100))
    checkpoints.save(1, state, force=True)
    for step in range(2, 5):
        checkpoints.save(step, state, force=True)
        flip(tmp_path / str(step) / "_CHECKPOINT_METADATA")
        assert checkpoints.newest_good(quarantine=True) == 1
    checkpoints.save(5, state, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4.damaged", "5"]


def test_a_damaged_record_does_not_stop_pruning(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=1))
    checkpoints.save(1, {"x": jnp.ones(2)}, metrics={"loss": 1.0}, force=True)
    truncate(tmp_path / "1" / "_CHECKPOINT_METADATA")
    checkpoints.save(2, {"x": jnp.ones(2)}, metrics={"loss": 2.0}, force=True)
    assert checkpoints.steps() == [2]
    assert "record of checkpoint" in caplog.text
    assert "cannot be read" in caplog.text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
RECORD = st.dictionaries(st.sampled_from(["metrics", "manifest", "time"]), ANYTHING)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """A checkpoint, and a function that puts something else into one of its files, with the right checksums."""
    directory = tmp_path_factory.mktemp("strangers")
    checkpoints = Checkpoints(directory, ALWAYS)
    checkpoints.save(1, {"params": {"a": jnp.ones((8, 2))}}, metrics={"loss": 1.0}, manifest={"data": "x"}, force=True)

    def crafted(name: str, content: bytes) -> Checkpoints:
        (directory / "1" / name).write_bytes(content)
        write_checksums(epath.Path(directory / "1"))
        assert checkpoints.newest_good() == 1
        return checkpoints

    original = {path: path.read_bytes() for path in (directory / "1").rglob("*") if path.is_file()}
    yield crafted, json.loads((directory / "1" / "_CHECKPOINT_METADATA").read_text())
    for path, content in original.items():
        path.write_bytes(content)


@given(RECORD | ANYTHING)
@settings(max_examples=50)
def test_the_record_of_a_stranger_is_read_or_refused(strangers, record):
    crafted, metadata = strangers
    content = json.dumps({**metadata, "custom_metadata": record}).encode()
    checkpoints = crafted("_CHECKPOINT_METADATA", content)
    with contextlib.suppress(UserError):
        assert isinstance(checkpoints.manifest(), dict)
    with contextlib.suppress(UserError):
        assert all(isinstance(value, float) for value in checkpoints.metrics().values())
    assert checkpoints.best_step() in (None, 1)


METADATA = ANYTHING | st.dictionaries(st.sampled_from(["item_handlers", "metrics", "custom_metadata"]), ANYTHING)


@given(st.binary(max_size=50) | METADATA.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=50)
def test_the_metadata_of_a_stranger_is_read_or_refused(strangers, content):
    crafted, _ = strangers
    with contextlib.suppress(UserError):
        crafted("_CHECKPOINT_METADATA", content).manifest()


TREE = st.dictionaries(st.sampled_from(["tree_metadata", "use_zarr3", "a"]), ANYTHING)


@given(st.binary(max_size=50) | TREE.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=50)
def test_the_tree_of_a_stranger_is_read_or_refused(strangers, content):
    crafted, metadata = strangers
    crafted("_CHECKPOINT_METADATA", json.dumps(metadata).encode())
    checkpoints = crafted("state/_METADATA", content)
    target = {"params": {"a": jax.ShapeDtypeStruct((8, 2), jnp.float32)}}
    with contextlib.suppress(UserError):
        checkpoints.restore(target)
