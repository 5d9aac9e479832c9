import dataclasses
import math

import pytest
from rich.console import Console

from t5x_like.errors import UserError
from t5x_like.planning import search as searching
from t5x_like.planning.compile import CompilerCrash
from t5x_like.planning.search import Result, candidates, changed, fit, pareto_front, ranked, search, worth_compiling
from t5x_like.planning.search_report import search_report
from t5x_like.planning.topology import parse_topology
from t5x_like.sharding.mesh import MeshConfig
from tests import toy


@pytest.fixture(scope="module")
def asked(request_for_cpu):
    return dataclasses.replace(request_for_cpu, topology=parse_topology("v5e:2x2"))


@pytest.fixture(scope="module")
def found(asked):
    return list(candidates(asked))


def test_candidates_fill_the_devices_and_pass_the_runs_own_checks(asked, found):
    settings = [c.settings for c in found]
    assert len(settings) == len({tuple(s.values()) for s in settings}) >= 24
    for s in settings:
        assert math.prod(s[f"MeshConfig.{axis}"] for axis in ("data", "fsdp", "expert", "sequence", "tensor")) == 4
        assert toy.BATCH % (s["MeshConfig.data"] * s["MeshConfig.fsdp"] * s["RunConfig.gradient_accumulation"]) == 0


def test_settings_are_what_the_gin_lines_make(asked, found):
    candidate = next(
        c for c in found if c.settings["StackConfig.remat"] == "full" and c.settings["MeshConfig.tensor"] == 2
    )
    experiment = changed(asked.experiment, candidate.settings)
    assert experiment.model.stack.remat == "full"
    assert experiment.mesh.tensor == 2
    assert "StackConfig.remat = 'full'" in candidate.gin()


def test_recomputation_takes_less_memory_and_more_flops(found):
    same = lambda c: {k: v for k, v in c.settings.items() if k != "StackConfig.remat"}
    by_remat = {c.settings["StackConfig.remat"]: c.model for c in found if same(c) == same(found[0])}
    assert by_remat["full"].memory.total <= by_remat["none"].memory.total
    assert by_remat["full"].hardware_flops > by_remat["none"].hardware_flops


def answer(candidate, seconds, gib):
    memory = dataclasses.replace(candidate.model.memory, total=int(gib * 2**30))
    timing = dataclasses.replace(candidate.model.timing, seconds=seconds)
    too_large = memory.total > candidate.model.topology.chip.memory
    return dataclasses.replace(
        candidate.model, memory=memory, timing=timing, out_of_memory=memory.total if too_large else None
    )


def test_ranking_and_front(found):
    numbers = [(3.0, 1), (1.0, 4), (2.0, 5), (0.5, 99), (2.5, 2)]
    results = [Result(c, answer(c, *n)) for c, n in zip(found, numbers, strict=False)]
    results.append(Result(found[5], None, "INTERNAL: crashed"))
    seconds = [r.plan and r.plan.seconds for r in ranked(results)]
    assert seconds == [1.0, 2.0, 2.5, 3.0, 0.5, None]  # what does not fit comes after what does
    assert [r.plan.seconds for r in pareto_front(results)] == [1.0, 2.5, 3.0]


def test_hopeless_candidates_are_not_compiled(found):
    slow = dataclasses.replace(found[0], model=answer(found[0], 1e9, 1))
    large = dataclasses.replace(found[1], model=answer(found[1], 1e-9, 1000))
    assert worth_compiling([slow, large, *found[2:8]], 4) == worth_compiling(found[2:8], 4)


def test_a_crash_is_recorded_and_the_search_goes_on(asked, found, monkeypatch):
    monkeypatch.setattr(searching, "candidates", lambda request: found[:6])
    monkeypatch.setattr(searching, "has_compiler", lambda platform: True)
    compiled = []

    def compile_plan(request, cache):
        compiled.append(request.quick)
        index = next(i for i, c in enumerate(found) if c.request.experiment == request.experiment)
        if index == 2:
            raise CompilerCrash("The compiler failed (signal 11): it wrote nothing")
        plan = answer(found[index], 1.0 + index, 1)
        return dataclasses.replace(plan, source="quick" if request.quick else "compiler")

    monkeypatch.setattr(searching, "compile_plan", compile_plan)
    seen = []
    advance = lambda done, total: seen.append((done, total))
    results = search(asked, most=6, finalists=2, workers=2, cache=None, advance=advance)
    assert (compiled.count(True), compiled.count(False)) == (6, 2)
    assert sorted(seen)[-1] == (8, 8)
    assert [r.plan and r.plan.source for r in results] == ["compiler", "compiler", "quick", "quick", "quick", None]
    console = Console(width=130, record=True, quiet=False)
    console.print(search_report(results))
    shown = " ".join(console.export_text().split())
    assert "the compiler failed" in shown
    assert "signal 11" in shown
    assert shown.count("RunConfig.gradient_accumulation = ") == 2  # the winner's lines and the crash's


def test_a_batch_that_no_mesh_divides(asked):
    data = dataclasses.replace(asked.experiment.data, batch_size=6)
    experiment = dataclasses.replace(asked.experiment, data=data, mesh=MeshConfig())
    topology = parse_topology("v5p:8x8x8")
    with pytest.raises(UserError, match="No mesh of 512 devices"):
        search(
            dataclasses.replace(
                asked,
                experiment=dataclasses.replace(
                    experiment, run=dataclasses.replace(experiment.run, gradient_accumulation=1)
                ),
                topology=topology,
            ),
            most=1,
            finalists=1,
            workers=1,
            cache=None,
            advance=lambda *_: None,
        )


def test_the_smallest_slice(asked):
    tried = []

    def plan(request):
        tried.append(request.topology.num_chips)
        candidate = next(candidates(asked))
        return answer(candidate, 1.0, 100 if request.topology.num_chips < 8 else 1)

    topology, _ = fit(asked, plan)
    assert (topology.num_chips, tried) == (8, [4, 8])
