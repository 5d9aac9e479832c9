"""Writes docs/plan.md: what the full-size recipes take on v5p and v6e. Needs libtpu; minutes per recipe.

python scripts/plan_recipes.py [RECIPE ...]
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from t5x_like.planning.report import duration, number
from t5x_like.planning.topology import CHIPS, GiB

RECIPES = {
    "gpt2_124m": ("--topology=v5p:2x2x1", "--topology=v6e:2x2"),
    "t5_1_1_xxl": ("--topology=v5p:4x4x4", "--topology=v6e:8x8"),
    "llama3_8b": ("--topology=v5p:4x4x4", "--topology=v6e:8x8 --gin_file=meshes/tpu_v6e.gin"),
    "llama3_70b": (
        "--topology=v5p:4x8x8",
        "--topology=v6e:16x16 --gin_file=meshes/tpu_v6e.gin --gin.RunConfig.gradient_accumulation=2",
    ),
    "mixtral_8x7b": ("--topology=v5p:4x4x4", "--topology=v6e:16x16"),
    "deepseek_v3": (
        "--topology=v5p:8x8x16 --gin_file=meshes/deepseek_v3_v5p.gin",
        "--topology=v6e:16x16 --num_slices=8 --gin_file=meshes/deepseek_v3_v6e.gin",
    ),
}
"""Runs, and the flags with which they are planned."""

PREPARED = ("t5_1_1_xxl", "mixtral_8x7b", "deepseek_v3")
"""Runs on a prepared corpus; the others are on texts."""

HEAD = """# What the recipes take
Written by `python scripts/plan_recipes.py`, which asks `t5x_like plan --gin_file=runs/RECIPE.gin` with the flags below:
it compiles each recipe's own training step for chips that are not there. Memory is the compiler's; time and MFU are
estimates (the compiler's cycles and the network's bandwidth). Two thousand chips take the compiler half an hour.

| recipe | flags | mesh | parameters | tokens per step | GiB per device | step | MFU |
|---|---|---|---|---|---|---|---|
"""


def row(recipe: str, flags: str) -> str:
    """One line of the table, from the plan that the command writes."""
    corpus = "CORPUS" if recipe in PREPARED else "TEXT_FILES"
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [
            f"--gin_file=runs/{recipe}.gin",
            *shlex.split(flags),
            f"--gin.{corpus}='unused'",
            f"--json={answer.name}",
        ]
        subprocess.run([sys.executable, "-m", "t5x_like", "plan", *command], check=True, stdout=sys.stderr)
        plan = json.load(answer)
    capacity = CHIPS[plan["topology"]["chip_name"]].memory
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    fits = plan["out_of_memory"] is None
    cells = (
        recipe,
        f"`{flags}`",
        mesh,
        number(plan["num_parameters"]),
        number(plan["tokens_per_step"]),
        f"{plan['memory']['total'] / GiB:.1f} of {capacity / GiB:.1f}",
        *((duration(plan["seconds"]), f"{plan['mfu']:.1%}") if fits else ("does not fit", "")),
    )
    return f"| {' | '.join(cells)} |\n"


def main(wanted: list[str]) -> None:
    """Plans the wanted recipes, and keeps the rows of the others; each row is written as soon as it is known."""
    table = Path(__file__).parent.parent / "docs/plan.md"
    lines = table.read_text().splitlines(keepends=True)
    places = [(recipe, flags) for recipe, all_flags in RECIPES.items() for flags in all_flags]
    rows = {place: line for place in places for line in lines if line.startswith(f"| {place[0]} | `{place[1]}` |")}
    for recipe, flags in places:
        if recipe in wanted or not wanted:
            rows[recipe, flags] = row(recipe, flags)
            print(rows[recipe, flags], end="", flush=True)
            table.write_text(HEAD + "".join(rows[place] for place in places if place in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
