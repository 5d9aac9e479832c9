import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t5x_like.planning.collectives import HOP_SECONDS, Network, bytes_of, first_group, kind_of
from t5x_like.planning.hlo import Instruction, parse_module
from t5x_like.planning.topology import parse_topology
from tests.planning.recorded import PROGRAM


def instruction(rest, opcode="all-reduce", shape="f32[4]"):
    return Instruction("x", shape, opcode, (), rest)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", [0, 4]),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1':(2)2}, x", [0, 2]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2,'d'=2], device_ids=([2,2,2]T(2,1,0)) {'c'}, x", [0, 2]),
        ("source_target_pairs={{0,0},{1,5},{5,1}}", [1, 5]),
        ("channel_id=1, replica_groups={}, x", list(range(8))),
    ],
)
def test_groups_in_all_spellings(text, group):
    assert first_group(instruction(text), 8).tolist() == group


def v5p(axes=("data", "tensor"), sizes=(16, 4)):
    coords = np.array([(x, y, z, 0) for z in range(4) for y in range(4) for x in range(4)])
    return Network(parse_topology("v5p:4x4x4"), axes, sizes, coords)


def test_axes_of_a_group():
    network = v5p()
    assert network.axes_of(np.arange(4)) == "tensor"
    assert network.axes_of(np.array([0, 4])) == "data"
    assert network.axes_of(np.arange(64)) == "data+tensor"


def test_ring_on_one_closed_dim_of_a_torus():
    """Four chips in a closed ring send both ways: each link carries 3/4 of half of the data."""
    links = 2 * v5p().topology.chip.link_bandwidth
    assert v5p().seconds("all-gather", 10**9, np.arange(4)) == pytest.approx(0.75e9 / links + 3 * HOP_SECONDS)
    assert v5p().seconds("all-reduce", 10**9, np.arange(4)) == pytest.approx(1.5e9 / links + 6 * HOP_SECONDS)


def test_more_dims_have_more_links():
    network = v5p()
    assert network.seconds("all-gather", 10**9, np.arange(64)) < network.seconds("all-gather", 10**9, np.arange(4)) / 2


def test_slices_are_joined_by_the_slow_network():
    topology = parse_topology("v5p:2x2x1", num_slices=2)
    coords = np.array([(x, y, 0, s) for s in range(2) for y in range(2) for x in range(2)])
    network = Network(topology, ("data", "fsdp"), (2, 4), coords)
    across = network.seconds("all-reduce", 10**9, np.array([0, 4]))
    assert across == pytest.approx(2 * 0.5e9 / topology.chip.network_bandwidth)
    # Over all eight, each chip of a slice takes a quarter of the array across.
    both = network.seconds("all-reduce", 10**9, np.arange(8))
    assert both == pytest.approx(network.seconds("all-reduce", 10**9, np.arange(4)) + across / 4)


def test_bytes_of_starts_are_those_of_the_result():
    start = instruction("", "all-gather-start", "(bf16[8,128]{1,0}, bf16[64,128]{1,0})")
    assert bytes_of(start) == 64 * 128 * 2
    scatter = instruction("replica_groups=[1,8]<=[8], x", "reduce-scatter", "f32[8]")
    assert bytes_of(scatter) == 8 * 8 * 4
    recorded = parse_module(PROGRAM).computations["main.1_spmd"]["all-reduce-start"]
    assert (kind_of(recorded), bytes_of(recorded)) == ("all-reduce", 4 * 10**6)


def test_what_xla_makes_of_a_sharded_product_on_this_machine():
    """Rows sharded over one axis of a mesh and the sum over the other: one all-reduce along that other axis."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((16, 32), np.float32, sharding=place("data", "tensor"))
    w = jax.ShapeDtypeStruct((32, 8), np.float32, sharding=place("tensor", None))
    text = jax.jit(lambda x, w: x @ w, out_shardings=place("data", None)).lower(x, w).compile().as_text()
    network = Network(parse_topology("cpu:8"), ("data", "tensor"), (2, 4), np.zeros((8, 1), int))
    found = [i for i, _ in parse_module(text).executions() if kind_of(i)]
    assert [(kind_of(i), network.axes_of(first_group(i, 8)), bytes_of(i)) for i in found] == [
        ("all-reduce", "tensor", 8 * 8 * 4)
    ]
