import re
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_like.config import parse_config
from t5x_like.config.parse import SHIPPED
from t5x_like.configurable import configurable
from t5x_like.errors import UserError
from t5x_like.sharding.logical import batch_axes, constrain, on_devices
from t5x_like.sharding.mesh import MeshConfig, _arranged, build_mesh, describe_mesh
from t5x_like.sharding.placement import Placement, partition_spec
from t5x_like.training.job import compile_step, set_up
from t5x_like.training.state import initial_state
from tests import toy


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
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [({"data": 3}, " (e.g. data=8)"), ({"data": 3, "tensor": 4}, " (e.g. data=2)"), ({"data": -1, "tensor": 3}, "")],
)
def test_a_mesh_that_does_not_fill_the_devices_is_refused(sizes, nearest):
    with pytest.raises(UserError, match="does not fill 8 devices: the sizes must multiply to 8" + re.escape(nearest)):
        build_mesh(MeshConfig(**sizes))


@dataclass(frozen=True)
class Chip:
    """A device of one of several slices."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def arrangement(**sizes):
    """The slice of every device in a mesh over two slices of four."""
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    slice_axis = sizes.pop("slice_axis", "data")
    sizes = MeshConfig(**sizes).resolve(8)
    return np.vectorize(lambda chip: chip.slice_index)(_arranged(sizes, slice_axis, 2, chips)).squeeze()


def test_only_one_axis_leaves_a_slice():
    assert arrangement(data=2, fsdp=2, tensor=2).tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    assert arrangement(data=4, tensor=2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert arrangement(data=1, fsdp=4, tensor=2, slice_axis="fsdp").tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_slices_that_cannot_share_their_axis_are_refused():
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    with pytest.raises(UserError, match=r"MeshConfig.data is 1, which 2 slices cannot share: .* e\.g\. 2"):
        build_mesh(MeshConfig(data=1, fsdp=8), chips)


@pytest.mark.parametrize("name", sorted(path.name for path in (SHIPPED / "meshes").glob("*.gin")))
def test_shipped_meshes_are_meshes(name):
    config = parse_config([f"meshes/{name}"], ["Holder.mesh = %MESH"], [])
    mesh = config.build(Holder).mesh
    assert mesh.resolve(64)


@configurable
class Holder:
    """What takes a mesh.

    Attributes:
      mesh: the mesh.
    """

    mesh: MeshConfig


def test_split_activations_take_the_length_where_heads_leave_it():
    tokens, heads = ("batch", "length", "embed"), ("batch", "length", "heads", "head_dim")
    sizes, rules = {**MESH, "fsdp": 1}, Placement(split_activations=True).activation_rules
    assert partition_spec(tokens, (4, 8, 6), sizes, rules) == P("data", "tensor", None)
    assert partition_spec(heads, (4, 8, 2, 3), sizes, rules) == P("data", None, "tensor", None)
    assert partition_spec(tokens, (4, 8, 6), {**sizes, "sequence": 2}, rules)[1] == ("sequence", "tensor")


@pytest.mark.slow  # Eight devices meet often: starved of processors, XLA:CPU gives up.
def test_training_with_split_activations_is_that_of_one_device(tmp_path):
    def losses(config, count):
        mesh = build_mesh(config, jax.devices()[:count])
        job = set_up(toy.experiment(tmp_path, mesh=config), mesh, toy.VOCAB)
        with jax.set_mesh(mesh):
            state, step = initial_state(job.create_state, job.state), compile_step(job)
            first, metrics = step(state, on_devices(toy.batch(), job.batch))
            return float(metrics["loss"]), float(step(first, on_devices(toy.batch(1), job.batch))[1]["loss"])

    ours = losses(MeshConfig(data=2, tensor=4, split_activations=True), 8)
    np.testing.assert_allclose(ours, losses(MeshConfig(), 1), rtol=1e-5)


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
