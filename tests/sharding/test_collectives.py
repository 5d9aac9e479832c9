"""What the compiled training step sends on each of the main layouts: nothing unforeseen.

A bound is (how often, KiB in all per device) of one kind of collective along some axes in one step; what has no bound
must not occur. Three layers, so that what is in their loop shows as a multiple of 3.
"""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_like.models.feedforward.moe import MoEConfig
from t5x_like.models.stack import PipelineConfig
from t5x_like.planning.collectives import Network, bytes_of, first_group, kind_of
from t5x_like.planning.hlo import parse_module
from t5x_like.planning.topology import parse_topology
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.job import compile_step, set_up
from tests import toy

LAYERS = 3


def sent(tmp_path, sizes, block=None, **pipeline):
    """(how often, bytes) by kind and axes."""
    config, model = MeshConfig(**sizes), toy.model()
    stack = dataclasses.replace(
        model.stack, num_layers=LAYERS, block=block or model.stack.block, pipeline=PipelineConfig(**pipeline)
    )
    mesh = build_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))])
    made = set_up(
        toy.experiment(tmp_path, mesh=config, decoder=dataclasses.replace(model, stack=stack)), mesh, toy.VOCAB
    )
    network = Network(parse_topology("cpu:8"), mesh.axis_names, mesh.axis_sizes, np.zeros((mesh.size, 1)))
    totals = {}
    for instruction, times in parse_module(compile_step(made).as_text()).executions():
        kind = kind_of(instruction)
        # A group of one device sends nothing.
        if kind is not None and len(group := first_group(instruction, mesh.size)) > 1:
            key = (kind, network.axes_of(group))
            count, size = totals.get(key, (0, 0))
            totals[key] = count + times, size + times * bytes_of(instruction)
    return totals


def experts():
    feedforward = MoEConfig(num_experts=4, experts_per_token=2, d_ff=32)
    return dataclasses.replace(toy.model().stack.block, feedforward=feedforward)


LAYOUTS = {
    # The gradients, once.
    "data": ({"data": 8}, {}, {("all-reduce", "data"): (5, 137)}),
    # Each of the 7 matrices of a layer forward and backward, and the embedding; a CPU scatters by reducing to all.
    "fsdp": (
        {"data": 1, "fsdp": 8},
        {},
        {("all-gather", "fsdp"): (43, 248), ("all-reduce", "fsdp"): (6, 137)},
    ),
    # Two sums of activations per layer forward and two backward; five for the vocabulary and the embedding.
    "tensor": ({"data": 1, "tensor": 4}, {}, {("all-reduce", "tensor"): (17, 371)}),
    "fsdp and tensor": (
        {"data": 1, "fsdp": 2, "tensor": 4},
        {},
        {("all-gather", "fsdp"): (43, 62), ("all-reduce", "fsdp"): (7, 35), ("all-reduce", "tensor"): (17, 186)},
    ),
    # Tokens to all devices of the expert axis and their results back (ring of experts), forward and backward; experts'
    # weights are gathered over `fsdp`.
    "experts": (
        {"data": 1, "fsdp": 2, "expert": 4},
        {"block": experts()},
        {
            ("all-gather", "expert"): (12, 51),
            ("all-gather", "fsdp"): (40, 143),
            ("all-reduce", "expert"): (4, 25),
            ("all-reduce", "fsdp"): (4, 50),
            ("all-reduce", "fsdp+expert"): (8, 19),
            ("reduce-scatter", "expert"): (9, 50),
            ("reduce-scatter", "fsdp"): (9, 36),
        },
    ),
    # Keys and values of each layer forward and again backward, and their gradients; the tokens' order changes once.
    "sequence": (
        {"data": 1, "sequence": 4},
        {},
        {
            ("all-gather", "sequence"): (12, 192),
            ("all-reduce", "sequence"): (7, 138),
            ("collective-permute", "sequence"): (13, 2),
            ("reduce-scatter", "sequence"): (6, 96),
        },
    ),
    # Vectors of a microbatch (4 KiB) forth at 6 ticks and back at 6; then the results from the last stage to all.
    "stages": (
        {"data": 1, "stage": 3},
        {"num_microbatches": 4},
        {
            ("all-gather", "stage"): (1, 24),
            ("all-reduce", "stage"): (1, 17),
            ("collective-permute", "stage"): (16, 80),
        },
    ),
    # Forth and back at 8 ticks; gradients of what all stages have are added up.
    "stages, 1f1b": (
        {"data": 1, "stage": 3},
        {"num_microbatches": 4, "schedule": "1f1b"},
        {("all-reduce", "stage"): (1, 9), ("collective-permute", "stage"): (16, 64)},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_sent_that_was_not_foreseen(layout, tmp_path):
    sizes, options, bounds = LAYOUTS[layout]
    found = sent(tmp_path, sizes, **options)
    beyond = {
        key: (count, round(size / 1024, 1))
        for key, (count, size) in found.items()
        if key not in bounds or count > bounds[key][0] or size > 1024 * bounds[key][1]
    }
    assert not beyond
