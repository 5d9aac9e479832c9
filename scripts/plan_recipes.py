"""Writes docs/plan.md: what the full-size recipes take on v5p and v6e. Needs libtpu; minutes per recipe.

python scripts/plan_recipes.py [RECIPE ...]
"""

import sys
from pathlib import Path

from t5x_like.commands.dry_run import known_vocabulary
from t5x_like.commands.plan import CACHE
from t5x_like.config import parse_config
from t5x_like.config.parse import SHIPPED
from t5x_like.errors import UserError
from t5x_like.planning.compile import compile_plan
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.report import duration, number
from t5x_like.planning.topology import GiB, parse_topology
from t5x_like.training.experiment import Experiment

RECIPES = {
    "gpt2_124m": ("v5p:2x2x1", "v6e:2x2"),
    "t5_1_1_xxl": ("v5p:4x4x4", "v6e:8x8"),
    "llama3_8b": ("v5p:4x4x4", "v6e:8x8"),
    "llama3_70b": ("v5p:4x8x8", "v6e:16x16"),
    "mixtral_8x7b": ("v5p:4x4x4", "v6e:16x16"),
    "deepseek_v3": ("v5p:8x8x16", "8 v6e:16x16"),
}
"""Runs and where they are planned: a slice, or several."""

PREPARED = ("t5_1_1_xxl", "mixtral_8x7b", "deepseek_v3")
"""Runs on a prepared corpus; the others are on texts."""

HEAD = """# What the recipes take
Written by `python scripts/plan_recipes.py`, which compiles each recipe's own training step for chips that are not
there. Memory is the compiler's; time and MFU are estimates (the compiler's cycles and the network's bandwidth). A mesh
file `meshes/RECIPE_CHIP.gin` is used where there is one, else the run's own.

| recipe | topology | mesh | parameters | tokens per step | GiB per device | step | MFU |
|---|---|---|---|---|---|---|---|
"""


def plan_of(recipe: str, topology: str) -> Plan:
    num_slices, _, shape = topology.rpartition(" ")
    files = [f"runs/{recipe}.gin"]
    mesh = f"meshes/{recipe}_{shape.partition(':')[0]}.gin"
    if (SHIPPED / mesh).exists():
        files.append(mesh)
    corpus = "CORPUS" if recipe in PREPARED else "TEXT_FILES"
    experiment = parse_config(files, [f"{corpus}='unused'"]).build(Experiment)
    place = parse_topology(shape, int(num_slices or 1))
    return compile_plan(Request(experiment, place, known_vocabulary(experiment)), CACHE)


def row(recipe: str, topology: str, plan: Plan) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    memory = f"{plan.memory.total / GiB:.1f} of {plan.topology.chip.memory / GiB:.1f}"
    fits = (duration(plan.seconds), f"{plan.mfu:.1%}") if plan.out_of_memory is None else ("does not fit", "")
    cells = (recipe, topology, mesh, number(plan.num_parameters), number(plan.tokens_per_step), memory, *fits)
    return f"| {' | '.join(cells)} |\n"


def main(wanted: list[str]) -> None:
    rows = []
    for recipe in wanted or RECIPES:
        for topology in RECIPES[recipe]:
            try:
                rows.append(row(recipe, topology, plan_of(recipe, topology)))
            except UserError as error:
                rows.append(f"| {recipe} | {topology} | | | | | {str(error).splitlines()[0]} | |\n")
            print(rows[-1], end="", flush=True)
    (Path(__file__).parent.parent / "docs/plan.md").write_text(HEAD + "".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
