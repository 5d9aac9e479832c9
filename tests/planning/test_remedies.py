import dataclasses

import pytest

from t5x_like.errors import UserError
from t5x_like.planning.remedies import remedies
from t5x_like.planning.search import candidates
from t5x_like.planning.topology import parse_topology


@pytest.fixture(scope="module")
def asked(request_for_cpu):
    return dataclasses.replace(request_for_cpu, topology=parse_topology("v5e:2x4"))


@pytest.fixture(scope="module")
def answers(asked):
    fits = next(candidates(asked)).model
    return dataclasses.replace(fits, out_of_memory=None), dataclasses.replace(fits, out_of_memory=10)


def test_three_changes_that_fit_the_cheapest_first(asked, answers):
    tried = []

    def plan(request):
        tried.append((request.experiment, request.topology.name))
        if request.experiment.mesh.tensor == 4:
            raise UserError("the heads cannot be divided")
        return answers[0] if request.experiment.run.gradient_accumulation >= 8 else answers[1]

    found = remedies(asked, plan)
    assert found[0].change == "StackConfig.remat = 'full', RunConfig.gradient_accumulation = 8"
    assert len(tried) == len(set(tried)), "nothing is tried twice"
    assert all(experiment.model.stack.remat == "full" for experiment, _ in tried[:5])


def test_more_chips_are_the_last_resort(asked, answers):
    found = remedies(asked, lambda request: answers[0] if request.topology.num_chips > 8 else answers[1], most=1)
    assert [remedy.change for remedy in found] == ["--topology=v5e:4x4, MeshConfig.fsdp = -1"]


def test_nothing_helps(asked, answers):
    assert remedies(asked, lambda request: answers[1]) == []
