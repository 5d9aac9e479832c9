"""Finds the mesh, the microbatches and the recomputation with which a run is fastest on given devices."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from t5x_like.errors import UserError
from t5x_like.planning.analytical import analytical_plan
from t5x_like.planning.compile import CompilerCrash, compile_plan, has_compiler
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.topology import Topology, slice_shapes
from t5x_like.training.experiment import Experiment

TENSOR = (1, 2, 4, 8)
EXPERT = (1, 4, 8, 16)
"""For mixtures of experts."""
SEQUENCE = (1, 2, 4, 8, 16)
"""Where there are fewer sequences than devices."""
MICROBATCHES = (1, 2, 4)
REMAT = ("none", "dots", "full")
MARGIN = 2.0
"""The memory model may be wrong by this factor before it rules a candidate out."""
SECONDS_MARGIN = 2.0
"""Candidates that the model predicts to take this many times the best one's step are not compiled."""


Settings = dict[str, int | str]
"""Gin bindings by name."""


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
      settings: gin bindings by name that make it.
      request: what to plan.
      model: what the analytical model says of it.
    """

    settings: Settings
    request: Request
    model: Plan

    def gin(self) -> list[str]:
        return [f"{name} = {value!r}" for name, value in self.settings.items()]


@dataclass(frozen=True)
class Result:
    """What became of a candidate: its plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    error: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.out_of_memory is None


def candidates(request: Request) -> Iterator[Candidate]:
    """Meshes that divide the devices, with microbatches and recomputation.

    Those that the run's own checks refuse are left out.
    """
    traces: dict = {}
    for mesh, parts, remat in itertools.product(_meshes(request), MICROBATCHES, REMAT):
        settings = {**mesh, "RunConfig.gradient_accumulation": parts, "StackConfig.remat": remat}
        try:
            asked = dataclasses.replace(request, experiment=changed(request.experiment, settings))
            yield Candidate(settings, asked, analytical_plan(asked, lower=False, traces=traces))
        except UserError:
            continue


def _meshes(request: Request) -> Iterator[Settings]:
    """All sizes of `data`, `fsdp` and `tensor`, and of `expert` and `sequence` where they may help.

    With `tensor`, once with the activations between its products whole, once with them split over the length.
    """
    experiment, devices = request.experiment, request.topology.num_devices
    blocks = [block for stack in experiment.model.stacks.values() for block in stack.blocks]
    experts = EXPERT if any(block.num_experts is not None for block in blocks) else (1,)
    lengths = SEQUENCE if experiment.data.batch_size < devices else (1,)
    for tensor, expert, sequence, data in itertools.product(TENSOR, experts, lengths, _data_sizes(request.topology)):
        fsdp, rest = divmod(devices, tensor * expert * sequence * data)
        if rest:
            continue
        sizes = {"data": data, "fsdp": fsdp, "expert": expert, "sequence": sequence, "tensor": tensor}
        settings = {f"MeshConfig.{axis}": size for axis, size in sizes.items()}
        for split in (False, True) if tensor > 1 else (False,):
            yield {**settings, "MeshConfig.split_activations": split}


def _data_sizes(topology: Topology) -> list[int]:
    """Copies of the model: one per slice or node at least where there are several, which saves the slow network."""
    groups = topology.num_devices // topology.devices_per_group
    return sorted({1, groups, groups * 4})


def changed(experiment: Experiment, settings: Settings) -> Experiment:
    """The experiment with these settings of its mesh, run and stacks, as gin would make it."""
    fields: dict[str, dict] = {"MeshConfig": {}, "RunConfig": {}, "StackConfig": {}}
    for name, value in settings.items():
        owner, _, field = name.partition(".")
        fields[owner][field] = value
    if "remat" in fields["StackConfig"]:
        fields["StackConfig"]["remat_names"] = ()
    return dataclasses.replace(
        experiment,
        model=_with_stacks(experiment.model, fields["StackConfig"]),
        run=dataclasses.replace(experiment.run, **fields["RunConfig"]),
        mesh=dataclasses.replace(experiment.mesh, **fields["MeshConfig"]),
    )


def _with_stacks(model, fields: dict):
    """The model's configuration with other fields in all of its stacks."""
    if hasattr(model, "remat"):
        return dataclasses.replace(model, **fields)
    parts = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    stacks = {name: _with_stacks(part, fields) for name, part in parts.items() if _holds_stack(part)}
    return dataclasses.replace(model, **stacks)


def _holds_stack(part) -> bool:
    if not dataclasses.is_dataclass(part):
        return False
    return hasattr(part, "remat") or any(_holds_stack(getattr(part, field.name)) for field in dataclasses.fields(part))


def worth_compiling(found: list[Candidate], most: int) -> list[Candidate]:
    """Those that may fit and may be fast, the most promising first."""
    fitting = [c for c in found if c.model.memory.total < MARGIN * c.model.topology.chip.memory]
    ranked = sorted(fitting, key=lambda c: (c.model.out_of_memory is not None, c.model.seconds))
    return [c for c in ranked if c.model.seconds < SECONDS_MARGIN * ranked[0].model.seconds][:most]


def search(
    request: Request,
    *,
    most: int,
    finalists: int,
    workers: int,
    cache: Path | None,
    advance: Callable[[int, int], None],
) -> list[Result]:
    """Plans the candidates and ranks them: what fits by time, then what does not.

    The analytical model rules out the hopeless; the compiler's memory and collectives (`Request.quick`) rank the rest;
    the best of them are compiled to the end.

    Args:
      request: the run; its mesh, microbatches and recomputation are what is searched.
      most: candidates to compile.
      finalists: candidates to compile to the end.
      workers: compilers at a time.
      cache: of former answers.
      advance: called with how many answers there are, of how many.

    Raises:
      UserError: if no candidate fits together with the run (batch, heads, devices).
    """
    found = list(candidates(request))
    if not found:
        raise UserError(
            f"No mesh of {request.topology.num_devices} devices divides DataConfig.batch_size "
            f"({request.experiment.data.batch_size}) and the heads: choose a batch that is a multiple of the devices."
        )
    chosen = worth_compiling(found, most)
    if not has_compiler(request.topology.chip.platform):
        return ranked([Result(candidate, candidate.model) for candidate in chosen])
    total = len(chosen) + min(finalists, len(chosen))
    with ThreadPoolExecutor(workers) as pool:

        def compiled(asked: list[Candidate], done: int, quick: bool) -> list[Result]:
            waiting = [pool.submit(_try, candidate, cache, quick) for candidate in asked]
            return [(advance(done + n, total), future.result())[1] for n, future in enumerate(as_completed(waiting), 1)]

        quick = ranked(compiled(chosen, 0, True))
        best = [result.candidate for result in quick if result.fits][:finalists]
        final = compiled(best, len(chosen), False)
    return [*ranked(final), *(result for result in quick if result.candidate not in best)]


def _try(candidate: Candidate, cache: Path | None, quick: bool) -> Result:
    try:
        return Result(candidate, compile_plan(dataclasses.replace(candidate.request, quick=quick), cache))
    except (CompilerCrash, UserError) as error:  # recorded; the others go on
        return Result(candidate, None, str(error).splitlines()[0])


def ranked(results: list[Result]) -> list[Result]:
    def key(result: Result) -> tuple:
        if result.plan is None:
            return (2, 0.0)
        return (0, result.plan.seconds) if result.fits else (1, float(result.plan.out_of_memory))

    return sorted(results, key=key)


def pareto_front(results: list[Result]) -> list[Result]:
    """Those of which none other takes both less memory and less time, the fastest first."""
    front: list[Result] = []
    for result in ranked([r for r in results if r.fits]):
        if not front or result.plan.memory.total < front[-1].plan.memory.total:
            front.append(result)
    return front


def fit(request: Request, plan: Callable[[Request], Plan]) -> tuple[Topology, Plan] | None:
    """The smallest slice of the chip on which the run fits, with every device in `fsdp`; None if none does.

    The number of sequences per step stays as it is. Sizes that cannot divide the batch are passed over.
    """
    for topology in slice_shapes(request.topology.chip_name):
        mesh = dataclasses.replace(request.experiment.mesh, data=1, fsdp=-1, tensor=request.experiment.mesh.tensor)
        asked = dataclasses.replace(
            request, topology=topology, experiment=dataclasses.replace(request.experiment, mesh=mesh)
        )
        try:
            if sum(analytical_plan(asked, lower=False).memory.exact.values()) > topology.chip.memory:
                continue
            answer = plan(asked)
        except UserError:
            continue
        if answer.out_of_memory is None:
            return topology, answer
    return None
