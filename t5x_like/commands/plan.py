"""`t5x_like plan`: what a run would take, and how fast it would be, on devices that are not there."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.commands.dry_run import known_vocabulary
from t5x_like.errors import UserError
from t5x_like.planning.analytical import analytical_plan
from t5x_like.planning.compare import comparison, measured, topology_name
from t5x_like.planning.compile import INSTALL, compile_plan, has_compiler
from t5x_like.planning.page import plan_page
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.remedies import remedies
from t5x_like.planning.report import remedies_report, report
from t5x_like.planning.search import fit, search
from t5x_like.planning.search_report import search_report
from t5x_like.planning.topology import parse_topology
from t5x_like.training.experiment import Experiment

CACHE = Path("~/.cache/t5x_like/plans").expanduser()
"""Former answers of the compiler, so that a search goes on where it was stopped."""
FINALISTS = 4

console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    define = {"flag_values": values}
    flags.DEFINE_string("topology", None, "Chips to plan for, e.g. v5p:4x4x4, v6e:16x16, h100:8x16, cpu:8.", **define)
    flags.DEFINE_integer("num_slices", 1, "Slices of that topology, joined by the data centre's network.", **define)
    flags.DEFINE_integer("vocab_size", None, "Of a tokenizer that is yet to be trained.", **define)
    flags.DEFINE_float("tokens", None, "Tokens to train on, for days and cost; default: the run's steps.", **define)
    flags.DEFINE_float("price_per_chip_hour", None, "Price of a chip for an hour, for the cost.", **define)
    flags.DEFINE_bool("analytical", False, "Use the analytical model although there is a compiler.", **define)
    flags.DEFINE_bool("search", False, "Find the best mesh, microbatches and recomputation.", **define)
    flags.DEFINE_bool("fit", False, "Find the smallest slice of the chip on which the run fits.", **define)
    flags.DEFINE_integer("max_candidates", 24, "Candidates of --search that are compiled.", lower_bound=1, **define)
    flags.DEFINE_integer("workers", 2, "Compilers at a time in --search.", lower_bound=1, **define)
    flags.DEFINE_string("compare", None, "MODEL_DIR of a run: sets its measured steps beside the plan.", **define)
    flags.DEFINE_string(
        "html", None, "Also write a page to this file: memory, timeline, and the search's plot.", **define
    )
    flags.DEFINE_string("json", None, "Also write the plan to this file.", **define)


def command(values: flags.FlagValues) -> int | None:
    """Plans a run for chips that need not be there: memory, collectives, time of a step, MFU, days and cost."""
    jax.config.update("jax_platforms", "cpu")  # planning needs no device, and must not take one from a run
    run = None
    if values.compare:
        directory = RunDirectory(values.compare)
        run = measured(directory)
        values.gin_file = values.gin_file or [str(directory.operative_config)]
        values.topology = values.topology or topology_name(run)
    configured = cli.configured(values, Experiment)
    if configured is None:
        return None
    experiment = configured[1]
    if values.topology is None:
        raise UserError("plan needs --topology, e.g. --topology=v5p:4x4x4.")
    topology = parse_topology(values.topology, values.num_slices)
    vocab_size = values.vocab_size or known_vocabulary(experiment)
    if vocab_size is None:
        kind = type(experiment.data.tokenizer).__name__
        raise UserError(f"The vocabulary of {kind} depends on the text: state its size with --vocab_size.")
    request = Request(experiment, topology, vocab_size)
    if values.search:
        return search_command(request, values)
    plan = fit_command(request) if values.fit else one_plan(request, values.analytical)
    tokens = values.tokens or plan.tokens_per_step * experiment.run.steps
    console.print(report(plan, tokens=tokens, price=values.price_per_chip_hour))
    if plan.out_of_memory:
        with console.status("looking for changes that fit ..."):
            found = remedies(request, judge(request, values.analytical))
        console.print(remedies_report(found))
    if run is not None:
        console.print(comparison(plan, run))
    if values.json:
        write(values.json, json.dumps(as_dict(plan), indent=2))
    if values.html:
        write(values.html, plan_page(plan))
    return None


def judge(request: Request, analytical: bool) -> Callable[[Request], Plan]:
    """What tells soonest whether a run fits: the compiler's memory, or the model where there is no compiler."""
    if not analytical and has_compiler(request.topology.chip.platform):
        return lambda asked: compile_plan(dataclasses.replace(asked, quick=True), CACHE)
    return analytical_plan


def one_plan(request: Request, analytical: bool) -> Plan:
    """By the compiler, or by the model where there is none or that is asked for."""
    platform = request.topology.chip.platform
    if not analytical and has_compiler(platform):
        with console.status(f"compiling for {request.topology.describe()} ..."):
            return compile_plan(request)
    if platform == "tpu" and not analytical:
        console.print(f"The TPU's compiler is not installed: {INSTALL}", style="yellow")
    return analytical_plan(request)


def fit_command(request: Request) -> Plan:
    """The plan on the smallest slice that holds the run."""
    with console.status("trying slices, the smallest first ..."):
        found = fit(request, judge(request, analytical=False))
    if found is None:
        raise UserError(
            f"The run fits on no single slice of {request.topology.chip_name} with all devices in `fsdp`: use a "
            "smaller batch, RunConfig.gradient_accumulation, or StackConfig.remat = 'full'."
        )
    console.print(f"The smallest slice that holds the run is {found[0].describe()}, with MeshConfig.fsdp = -1.\n")
    return found[1]


def search_command(request: Request, values: flags.FlagValues) -> None:
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task("looking at meshes", total=None)
        results = search(
            request,
            most=values.max_candidates,
            finalists=FINALISTS,
            workers=values.workers,
            cache=CACHE,
            advance=lambda done, total: progress.update(task, description="compiling", completed=done, total=total),
        )
    console.print(search_report(results))
    if values.json:
        rows = [(r.candidate.settings, r.error, r.plan and as_dict(r.plan)) for r in results]
        listed = [{"settings": settings, "error": error, "plan": plan} for settings, error, plan in rows]
        write(values.json, json.dumps(listed, indent=2))
    if values.html and results[0].plan is not None:
        write(values.html, plan_page(results[0].plan, results))


def write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def as_dict(plan: Plan) -> dict:
    """The plan as plain JSON values; times in seconds, sizes in bytes."""
    derived = {name: getattr(plan, name) for name in ("seconds", "tokens_per_second", "mfu")}
    return dataclasses.asdict(plan) | derived
