import numpy as np
import pytest

from t5x_like.planning.collectives import Network
from t5x_like.planning.hlo import parse_module
from t5x_like.planning.timing import KERNEL_EFFICIENCY, predict
from t5x_like.planning.topology import parse_topology
from tests.planning.recorded import PROGRAM

COORDS = np.array([(x, y, z, 0) for z in range(2) for y in range(2) for x in range(2)])
NETWORK = Network(parse_topology("v5p:2x2x2"), ("data", "fsdp"), (2, 4), COORDS)
CLOCK = NETWORK.topology.chip.clock


def test_a_recorded_step_takes_its_cycles_and_waits_for_its_collectives():
    timing = predict(parse_module(PROGRAM), NETWORK)
    # 32 layers, in each of which the loop over keys takes (32 + 1) / 2 turns by assumption.
    cycles = 17500000 + 32 * (1750000 + 16.5 * 100)
    gathers = 32 * NETWORK.seconds("all-gather", 4096 * 4096 * 2, np.arange(4))
    assert timing.compute == pytest.approx(cycles / CLOCK)
    assert timing.seconds == pytest.approx(cycles / CLOCK + gathers)
    assert timing.assumed_loops == 1
    assert timing.scopes["MLP > Linear (models/parameters.py:127)"] == pytest.approx(32 * 1750000 / CLOCK)


def test_collectives_are_counted_by_axes_and_hidden_where_they_overlap():
    gather, reduce = predict(parse_module(PROGRAM), NETWORK).collectives
    assert (gather.kind, gather.axes, gather.count, gather.overlapped) == ("all-gather", "fsdp", 32, 0)
    assert gather.bytes == 32 * 4096 * 4096 * 2
    assert gather.exposed == gather.seconds > 0
    # 4 MB over the data axis take far less than the 10 ms of computation between start and end.
    assert (reduce.kind, reduce.axes, reduce.overlapped, reduce.exposed) == ("all-reduce", "data", 1, 0)


def test_a_collective_that_outlasts_what_hides_it_is_exposed_for_the_rest():
    text = PROGRAM.replace('"estimated_cycles":"17500000"', '"estimated_cycles":"175"')
    reduce = predict(parse_module(text), NETWORK).collectives[1]
    assert reduce.exposed == pytest.approx(reduce.seconds - 175 / CLOCK)


def test_kernels_take_their_own_estimate():
    kernel = (
        '  %kernel = f32[8]{0} custom-call(%param), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"459000000000","bytes_accessed":"1000"}}}\n'
    )
    text = PROGRAM.replace("  %all-reduce-start", kernel + "  %all-reduce-start")
    timing = predict(parse_module(text), NETWORK)
    assert timing.kernels == pytest.approx(1e-3 / KERNEL_EFFICIENCY)


def test_the_timeline_covers_the_step_in_order():
    timing = predict(parse_module(PROGRAM), NETWORK)
    ends = [segment.start + segment.seconds for segment in timing.timeline]
    assert max(ends) <= timing.seconds * (1 + 1e-9)
    assert sum(segment.seconds for segment in timing.timeline) == pytest.approx(timing.seconds, rel=0.01)
    assert [s.kind for s in timing.timeline[:3]] == ["compute", "collective", "compute"]
