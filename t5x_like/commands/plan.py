"""`t5x_like plan`: what a run would take, and how fast it would be, on devices that are not there."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from t5x_like.commands import cli
from t5x_like.errors import UserError
from t5x_like.planning.analytical import analytical_plan
from t5x_like.planning.compile import INSTALL, compile_plan, has_compiler
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.report import report
from t5x_like.planning.topology import parse_topology
from t5x_like.training.experiment import Experiment


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
    flags.DEFINE_string("json", None, "Also write the plan to this file.", **define)


def command(values: flags.FlagValues) -> int | None:
    """Plans a run for chips that need not be there: memory, collectives, time of a step, MFU, days and cost."""
    configured = cli.configured(values, Experiment)
    if configured is None:
        return None
    experiment = configured[1]
    if values.topology is None:
        raise UserError("plan needs --topology, e.g. --topology=v5p:4x4x4.")
    topology = parse_topology(values.topology, values.num_slices)
    request = Request(experiment, topology, vocabulary(experiment, values.vocab_size))
    console = Console(highlight=False)
    if not (analytical := values.analytical or not has_compiler(topology.chip.platform)):
        with console.status(f"compiling for {topology.describe()} ..."):
            plan = compile_plan(request)
    else:
        plan = analytical_plan(request)
    tokens = values.tokens or plan.tokens_per_step * experiment.run.steps
    if analytical and topology.chip.platform == "tpu" and not values.analytical:
        console.print(f"The TPU's compiler is not installed: {INSTALL}", style="yellow")
    console.print(report(plan, tokens=tokens, price=values.price_per_chip_hour))
    if values.json:
        Path(values.json).write_text(json.dumps(as_dict(plan), indent=2) + "\n")
    return None


def vocabulary(experiment: Experiment, stated: int | None) -> int:
    """The size of the vocabulary, without reading any text."""
    known = stated or experiment.model.vocab_size or getattr(experiment.data.tokenizer, "vocab_size", None)
    if known is None:
        kind = type(experiment.data.tokenizer).__name__
        raise UserError(f"The vocabulary of {kind} depends on the text: state its size with --vocab_size.")
    return known


def as_dict(plan: Plan) -> dict:
    """The plan as plain JSON values; times in seconds, sizes in bytes."""
    derived = {name: getattr(plan, name) for name in ("seconds", "tokens_per_second", "mfu")}
    return dataclasses.asdict(plan) | derived
