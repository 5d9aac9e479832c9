import jax
import pytest
from jax.sharding import PartitionSpec as P

from t5x_like.errors import UserError
from t5x_like.sharding.logical import batch_axes, constrain, partition_spec
from t5x_like.sharding.mesh import MeshConfig, build_mesh, describe_mesh


def test_the_free_axis_takes_the_devices_left():
    assert MeshConfig(tensor=2).resolve(8)["data"] == 4
    assert MeshConfig(data=2, fsdp=-1, tensor=2).resolve(8)["fsdp"] == 2


def test_a_mesh_has_all_axes_and_says_what_it_is():
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == ("data", "fsdp", "stage", "expert", "sequence", "tensor")
    assert describe_mesh(mesh) == "data=2 x fsdp=2 x tensor=2 (8 cpu devices)"
    assert describe_mesh(build_mesh(MeshConfig(), jax.devices()[:1])) == "one device (1 cpu device)"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "data=0: sizes are at least 1"),
        ({"fsdp": -1}, "-1 for data, fsdp: at most one"),
        ({"stage": 2}, "MeshConfig.stage is 2"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**sizes)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 2}, {"data": -1, "tensor": 3}, {"data": 16}])
def test_a_mesh_that_does_not_fill_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match="does not fill 8 devices"):
        build_mesh(MeshConfig(**sizes))


MESH = {"data": 2, "fsdp": 4, "stage": 1, "expert": 1, "sequence": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 6), P("fsdp", "tensor")),
        (("vocab", "embed"), (7, 8), P(None, "fsdp")),  # 7 rows cannot be halved
        (("layers", "embed", "kv_heads", "head_dim"), (3, 8, 1, 4), P(None, "fsdp", None, None)),
        (("batch", "length", "embed"), (8, 5, 8), P(("data", "fsdp"), None, None)),
        (("norm",), (8,), P(None)),
        ((), (), P()),
    ],
)
def test_rules_use_each_mesh_axis_once_and_only_where_it_divides(axes, shape, expected):
    assert partition_spec(axes, shape, MESH) == expected


def test_the_expert_axis_splits_experts_and_the_batch_but_no_router():
    mesh = {**MESH, "fsdp": 2, "expert": 2}
    assert partition_spec(("batch", "length"), (8, 5), mesh) == P(("data", "fsdp", "expert"), None)
    assert partition_spec(("expert", "embed", "mlp"), (4, 8, 6), mesh) == P("expert", "fsdp", "tensor")
    assert partition_spec(("embed", "router"), (8, 4), mesh) == P("fsdp", None)


def test_batch_axes_are_those_that_a_shard_map_around_leaves():
    seen = []

    def inside(x):
        seen.append(batch_axes())
        return x

    assert batch_axes() == ()
    with jax.set_mesh(build_mesh(MeshConfig(data=2, fsdp=2, expert=2))):
        assert batch_axes() == ("data", "fsdp", "expert")
        jax.jit(jax.shard_map(inside, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))(jax.numpy.ones(8))
    assert seen[0] == ("fsdp", "expert")


def test_constrain_acts_under_a_mesh_only():
    x = jax.numpy.zeros((8, 4))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(build_mesh(MeshConfig())):
        assert jax.jit(lambda x: constrain(x, "batch", None))(x).sharding.spec == P("data")
