"""What would make a run fit that does not fit."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from t5x_like.errors import UserError
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.search import Settings, changed
from t5x_like.planning.topology import slice_shapes


@dataclass(frozen=True)
class Remedy:
    """A change with which the run fits.

    Attributes:
      change: gin bindings, or a flag.
      plan: of the changed run.
    """

    change: str
    plan: Plan


def remedies(request: Request, plan: Callable[[Request], Plan], most: int = 3) -> list[Remedy]:
    """Up to `most` changes that make the run fit, those that cost its user least first.

    Args:
      request: of the run that does not fit.
      plan: tells whether a changed run does.
      most: stop when so many are found.
    """
    found: list[Remedy] = []
    for change, asked in _changes(request):
        try:
            answer = plan(asked)
        except UserError:  # the batch or the heads cannot be divided so
            continue
        if answer.out_of_memory is None:
            found.append(Remedy(change, answer))
        if len(found) == most:
            break
    return found


def _changes(request: Request) -> Iterator[tuple[str, Request]]:
    """Recomputation first, then smaller parts of the batch, other meshes, more chips."""
    experiment = request.experiment
    parts = experiment.run.gradient_accumulation
    full = {"StackConfig.remat": "full"}
    settings: list[Settings] = [full]
    settings += [{**full, "RunConfig.gradient_accumulation": parts * n} for n in (2, 4, 8)]
    settings += [{**full, "MeshConfig.data": 1, "MeshConfig.fsdp": -1}]
    settings += [{**full, "MeshConfig.data": 1, "MeshConfig.fsdp": -1, "MeshConfig.tensor": n} for n in (2, 4, 8)]
    before = {experiment}
    for change in settings:
        # What the run has already is no change, and what it cannot have (the batch does not divide) none either.
        with contextlib.suppress(UserError):
            new = {name: value for name, value in change.items() if changed(experiment, {name: value}) != experiment}
            other = changed(experiment, new)
            if other not in before:
                before.add(other)
                gin = ", ".join(f"{name} = {value!r}" for name, value in new.items())
                yield gin, dataclasses.replace(request, experiment=other)
    for topology in slice_shapes(request.topology.chip_name):
        if topology.num_chips > request.topology.num_chips:
            mesh = dataclasses.replace(experiment.mesh, data=1, fsdp=-1)
            other = dataclasses.replace(experiment, mesh=mesh)
            yield (
                f"--topology={topology.name}, MeshConfig.fsdp = -1",
                dataclasses.replace(request, experiment=other, topology=topology),
            )
