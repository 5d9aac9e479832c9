import re

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


OFFLOADED = """%reduced (p: f32[1000,1000]) -> f32[1000,1000] {
  ROOT %inner = f32[1000,1000]{1,0} all-reduce(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%sum
}

%on_sparse_core (p: f32[1000,1000]) -> f32[1000,1000] {
  ROOT %run = f32[1000,1000]{1,0} call(%p), to_apply=%reduced
}

"""


def test_a_collective_may_run_in_a_call_beside_the_computation():
    start = 'async-start(%param), async_execution_thread="sparsecore", calls=%on_sparse_core'
    text = re.sub(r"all-reduce-start\(.*", start, PROGRAM).replace("all-reduce-done(", "async-done(")
    text = text.replace("ENTRY", OFFLOADED + "ENTRY")
    assert predict(parse_module(text), NETWORK).collectives == predict(parse_module(PROGRAM), NETWORK).collectives


def test_a_chain_of_fusions_is_one_collective():
    groups = "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}"
    step = "%step (p: f32[1000,1000]) -> f32[1000,1000] {{\n  ROOT %{} = f32[1000,1000]{{1,0}} {}\n}}\n\n"
    fused = step.format("reduced", f"all-reduce(%p), channel_id=1, {groups}, to_apply=%sum")
    lines = [f"  %part.{i} = f32[1000,1000]{{1,0}} fusion(%param), kind=kCustom, calls=%step" for i in range(2)]
    text = re.sub(r"  %all-reduce-start =.*", "\n".join(lines), PROGRAM).replace("ENTRY", fused + "ENTRY")
    end = "%all-reduce-done = f32[1000,1000]{1,0} fusion(%part.1), kind=kCustom, calls=%step"
    text = re.sub(r"%all-reduce-done =.*", end, text)
    _, reduce = predict(parse_module(text), NETWORK).collectives
    assert (reduce.count, reduce.overlapped, reduce.bytes, reduce.exposed) == (1, 1, 4 * 10**6, 0)


def test_a_fusion_may_share_its_channel_with_a_collective_of_its_own():
    groups = "channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%sum"
    fused = f"%step (p: f32[9]) -> f32[9] {{\n  ROOT %r = f32[1000,1000]{{1,0}} all-reduce(%p), {groups}\n}}\n\n"
    lone = "  %lone = f32[1000,1000]{1,0} fusion(%param), kind=kCustom, calls=%step\n"
    text = PROGRAM.replace("  %all-reduce-done", lone + "  %all-reduce-done").replace("ENTRY", fused + "ENTRY")
    assert {c.kind: c.count for c in predict(parse_module(text), NETWORK).collectives}["all-reduce"] == 2


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
