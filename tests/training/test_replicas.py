import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.recovery import Fault
from t5x_like.training.replicas import ReplicaCheck, ReplicaComparison


def place(mesh, specs):
    values = {"a": jnp.arange(64.0).reshape(8, 8), "b": jnp.ones(6, jnp.bfloat16), "c": jnp.arange(16.0)}
    return {name: jax.device_put(values[name], NamedSharding(mesh, spec)) for name, spec in specs.items()}


def with_flipped_bit(array, device, bit=0):
    """The array with one bit flipped in the copy that one device holds."""
    pieces = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint8)[-1] ^= 1 << bit
        pieces.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


MESH = MeshConfig(data=2, fsdp=2, tensor=2)
SPECS = {"a": P("fsdp", "tensor"), "b": P(), "c": P(("data", "fsdp", "tensor"))}


def test_equal_copies_are_no_fault():
    mesh = build_mesh(MESH)
    params = place(mesh, SPECS)
    comparison = ReplicaComparison(params, mesh)
    assert comparison.possible
    assert comparison.differences(comparison.start(params)) == []


@pytest.mark.parametrize("bit", range(8))
def test_one_flipped_bit_names_the_device_and_the_array(bit):
    mesh = build_mesh(MESH)
    params = place(mesh, SPECS)
    comparison = ReplicaComparison(params, mesh)
    broken = {**params, "b": with_flipped_bit(params["b"], jax.devices()[5], bit)}
    assert comparison.differences(comparison.start(broken)) == ["b on cpu device 5 of process 0"]


def test_of_two_copies_both_are_named_and_what_has_no_copy_is_not_compared():
    mesh = build_mesh(MESH)
    params = place(mesh, SPECS)
    comparison = ReplicaComparison(params, mesh)
    holders = sorted(
        shard.device.id for shard in params["a"].addressable_shards if shard.index == (slice(0, 4), slice(4, 8))
    )
    broken = {**params, "a": with_flipped_bit(params["a"], jax.devices()[holders[0]])}
    broken["c"] = with_flipped_bit(params["c"], jax.devices()[3])
    named = ", ".join(f"cpu device {number} of process 0" for number in holders)
    assert comparison.differences(comparison.start(broken)) == [f"a on {named}"]


def test_nothing_to_compare_on_one_device_or_without_copies():
    single = build_mesh(MeshConfig(), jax.devices()[:1])
    check = ReplicaCheck(place(single, {"a": P()}), single, 1)
    check.after_step(1, None)
    check.check_now(1, None)
    mesh = build_mesh(MeshConfig(data=1, fsdp=8))
    assert not ReplicaComparison(place(mesh, {"a": P("fsdp")}), mesh).possible


def test_the_verdict_comes_one_step_later_and_before_a_save_at_once():
    mesh = build_mesh(MESH)
    good = place(mesh, SPECS)
    bad = {**good, "b": with_flipped_bit(good["b"], jax.devices()[2])}
    check = ReplicaCheck(good, mesh, 10)
    check.after_step(9, bad)
    check.after_step(10, bad)
    with pytest.raises(Fault, match="copies of parameters differ: b on cpu device 2") as fault:
        check.after_step(11, good)
    assert fault.value.step == 10
    assert not fault.value.bad_steps
    check.check_now(12, good)
    with pytest.raises(Fault):
        check.check_now(13, bad)


def test_the_only_fetch_is_small():
    mesh = build_mesh(MESH)
    params = place(mesh, SPECS)
    hashes = ReplicaComparison(params, mesh).start(params)
    assert (hashes.shape, hashes.dtype) == ((8, 3), jnp.uint32)
