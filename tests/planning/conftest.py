"""One small run, compiled once, for all tests of what a plan says."""

import dataclasses

import pytest

from t5x_like.planning.compile import compile_plan
from t5x_like.planning.plan import Request
from t5x_like.planning.topology import parse_topology
from t5x_like.sharding.mesh import MeshConfig
from tests import toy


@pytest.fixture(scope="session")
def request_for_cpu(tmp_path_factory):
    """A toy decoder on eight virtual CPU devices, in two microbatches, with averaged parameters."""
    directory = tmp_path_factory.mktemp("plan")
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    experiment = toy.experiment(directory, mesh=mesh, gradient_accumulation=2, ema_decay=0.9)
    return Request(experiment, parse_topology("cpu:8"), toy.VOCAB)


@pytest.fixture(scope="session")
def cpu_plan(request_for_cpu):
    return compile_plan(request_for_cpu)


@pytest.fixture(scope="session")
def tpu_plan(cpu_plan):
    """The same, as if a TPU's compiler had made it: with the timing of a recorded program."""
    from t5x_like.planning.hlo import parse_module
    from t5x_like.planning.timing import predict
    from tests.planning.recorded import PROGRAM
    from tests.planning.test_timing import NETWORK

    timing = predict(parse_module(PROGRAM), NETWORK)
    return dataclasses.replace(cpu_plan, topology=NETWORK.topology, timing=timing)
