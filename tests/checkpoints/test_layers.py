"""Layers that move between arrays of their own and stacked ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.checkpoints.layers import moved, relaid, relay, sources
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.errors import UserError

SCANNED = {"stack/unrolled/0": (0,), "stack/scanned/0": (1, 3), "stack/scanned/1": (2, 4), "stack/unrolled/5": (5,)}
UNROLLED = {f"stack/unrolled/{i}": (i,) for i in range(6)}
BY_ONE = {"stack/scanned/0": tuple(range(6))}


def layer(i):
    """Three arrays of a layer; kernels of odd layers are wider, and layer 4 has one more."""
    kernel = np.random.default_rng(i).normal(size=(3, 4 + i % 2)).astype(np.float32)
    return {("kernel",): kernel, ("bias",): kernel[0]} | ({("gate",): kernel[1]} if i in (2, 4) else {})


def unrolled(alike=False):
    layers = {
        (*tree, "stack", "unrolled", str(i), *name): array + len(tree)
        for tree in [("params",), ("opt_state", "0", "mu")]
        for i in range(6)
        for name, array in layer(0 if alike else i).items()
    }
    return layers | {("params", "embedding"): np.ones(5), ("step",): np.int32(3)}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(actual[name], array)


def test_there_and_back_changes_no_bit():
    arrays = unrolled()
    scanned = relaid(arrays, UNROLLED, SCANNED)
    kernel = scanned["opt_state", "0", "mu", "stack", "scanned", "1", "kernel"]
    np.testing.assert_array_equal(kernel, np.stack([layer(2)["kernel",], layer(4)["kernel",]]) + 3)
    assert ("params", "stack", "scanned", "0", "gate") not in scanned
    assert_same(relaid(scanned, SCANNED, UNROLLED), arrays)
    assert_same(relaid(relaid(scanned, SCANNED, UNROLLED), UNROLLED, SCANNED), scanned)
    alike = unrolled(alike=True)
    assert_same(relaid(relaid(alike, UNROLLED, BY_ONE), BY_ONE, SCANNED), relaid(alike, UNROLLED, SCANNED))


def test_unlike_layers_are_not_stacked():
    assert ("params", "stack", "scanned", "0", "kernel") not in relaid(unrolled(), UNROLLED, BY_ONE)


def test_only_stacks_with_the_same_layers_are_moved():
    encoder = {"encoder/scanned/0": [0, 1]}
    assert moved(SCANNED | encoder, UNROLLED | encoder) == (SCANNED, UNROLLED)
    assert moved({"stack/scanned/0": [0, 1]}, UNROLLED) == ({}, {})
    assert moved({}, UNROLLED) == ({}, {})


@pytest.mark.parametrize(("old", "new"), [(UNROLLED, BY_ONE), (BY_ONE, UNROLLED), (BY_ONE, SCANNED)])
def test_checkpoints_are_read_into_other_places(tmp_path, old, new):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("stage", "fsdp"))
    arrays = {name: jnp.asarray(array) for name, array in unrolled(alike=True).items()}
    saved, expected = (traverse_util.unflatten_dict(relaid(arrays, UNROLLED, places)) for places in (old, new))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
    checkpoints.save(1, saved, manifest={"layers": {place: list(numbers) for place, numbers in old.items()}})

    def target(path, x):
        scanned = [key.key for key in path][-3:-1] == ["scanned", "0"]
        stage = "stage" if scanned and x.shape[0] % 2 == 0 else None
        spec = [stage, None, "fsdp"] if x.ndim == 3 else [None, "fsdp"] if path[-1].key == "kernel" else []
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    wanted = jax.tree.map_with_path(target, expected)
    with pytest.raises(UserError, match="does not fit this model"):
        checkpoints.restore(wanted, 1)
    restored = checkpoints.restore(wanted, 1, layers=new)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, leaf: x.sharding == leaf.sharding, restored, wanted)))
    with pytest.raises(UserError, match="does not fit this model"):
        checkpoints.restore({"params": wanted["params"] | {"more": wanted["step"]}}, 1, partial=True, layers=new)
    part = {"params": {"stack": wanted["params"]["stack"]}}
    restored = checkpoints.restore(part, 1, partial=True, layers=new)
    jax.tree.map(np.testing.assert_array_equal, restored["params"]["stack"], expected["params"]["stack"])
    checkpoints.close()


def test_what_is_read_is_parted_as_the_target_is():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("stage", "fsdp"))
    name = lambda *place: ("params", "stack", *place, "kernel")
    shape = lambda *dims, spec=None: jax.ShapeDtypeStruct(
        dims, jnp.float32, sharding=spec and NamedSharding(mesh, PartitionSpec(*spec))
    )
    saved = {name("unrolled", str(i)): shape(4, 8) for i in range(6)}
    target = {name("scanned", "0"): shape(6, 4, 8, spec=("stage", None, "fsdp"))}
    read = sources(saved, target, UNROLLED, BY_ONE)
    assert {leaf.sharding.spec for leaf in read.values()} == {PartitionSpec("stage", "fsdp")}
    back = sources(target, {n: shape(4, 8, spec=(None, "fsdp")) for n in saved}, BY_ONE, UNROLLED)
    assert back[name("scanned", "0")].sharding.spec == PartitionSpec(None, None, "fsdp")
    arrays = {n: jax.device_put(jnp.full((4, 8), float(n[3])), leaf.sharding) for n, leaf in read.items()}
    result = relay(arrays, target, UNROLLED, BY_ONE)
    assert not arrays
    assert result[name("scanned", "0")].sharding == target[name("scanned", "0")].sharding
    np.testing.assert_array_equal(result[name("scanned", "0")][:, 0, 0], range(6))
