import pytest

from t5x_like.errors import UserError
from t5x_like.planning.topology import CHIPS, parse_topology, slice_shapes


def test_slices_of_tpus():
    topology = parse_topology("v5p:8x8x16", num_slices=2)
    assert (topology.num_chips, topology.num_devices, topology.wrap) == (2048, 2048, (True, True, True))
    assert parse_topology("v7x:2x2x1").num_devices == 8
    assert parse_topology("v5p:2x2x4").wrap == (False, False, False)
    assert parse_topology("v6e:8x16").wrap == (False, True)
    assert parse_topology("tpu7x:4x4x4").chip_name == "v7x"


def test_nodes_of_gpus():
    topology = parse_topology("h100:8x16")
    assert (topology.num_chips, topology.devices_per_group) == (128, 8)
    assert parse_topology("h200:1").shape == (1, 1)


@pytest.mark.parametrize(
    "name", ["v5q:2x2", "v5p", "v5p:4x4x", "v5e:3x3", "v5p:4x4", "v4:2x3x1", "h100:16x2", "cpu:2x2"]
)
def test_unknown_topologies_are_refused_with_those_known(name):
    with pytest.raises(UserError, match=r"(?s)Known are:.*:\w+"):
        parse_topology(name)


def test_known_shapes_are_listed_with_their_chips():
    with pytest.raises(UserError, match=r"v5e:4x8 \(32\)"):
        parse_topology("v5e:5x5")


def test_slices_only_of_tpus():
    with pytest.raises(UserError, match="--num_slices=2"):
        parse_topology("h100:8", 2)


def test_offered_shapes_grow():
    for name in CHIPS.keys() - {"cpu"}:
        sizes = [topology.num_chips for topology in slice_shapes(name)]
        assert sizes == sorted(sizes)


def test_every_chip_but_the_cpu_has_a_peak():
    assert [name for name, chip in CHIPS.items() if chip.peak_flops is None] == ["cpu"]
