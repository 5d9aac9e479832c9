"""Writes the tables of docs/meshes.md from what was measured.

python scripts/document_meshes.py --layouts [NAME ...]   full-size models compiled for TPUs that are not there;
                                                         all of them or the named ones; needs libtpu, and minutes
python scripts/document_meshes.py --schedules            memory of the schedules of a pipeline
python scripts/document_meshes.py --matrix FILE [...]    models on meshes; FILE is what
    python -m pytest -m slow tests/sharding/test_parallelism.py --junitxml=FILE      has written of all or some
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from t5x_like.commands.dry_run import known_vocabulary
from t5x_like.commands.plan import CACHE
from t5x_like.config import parse_config
from t5x_like.planning.compile import compile_plan
from t5x_like.planning.plan import Plan, Request
from t5x_like.planning.report import duration
from t5x_like.planning.topology import GiB, parse_topology
from t5x_like.training.experiment import Experiment

PAGE = Path(__file__).parent.parent / "docs" / "meshes.md"
KEPT = Path(__file__).parent.parent / "docs" / "layouts.json"
MODELS = ("decoder", "encoder", "encoder_decoder", "moe")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a slice.

    Attributes:
      topology: of the slice.
      files: of the configuration.
      bindings: on top of them.
    """

    topology: str
    files: tuple[str, ...]
    bindings: tuple[str, ...]


_TEXT = ("TEXT_FILES='unused'",)
_CORPUS = ("CORPUS='unused'",)
LAYOUTS = {
    "Llama 2 7B": Layout(
        "v5p:4x4x4",
        ("runs/llama3_8b.gin", "models/llama2_7b.gin", "meshes/tpu_v5p.gin"),
        (*_TEXT, "BATCH_SIZE=64", "VOCAB_SIZE=32000"),
    ),
    "Llama 3 70B": Layout("v5p:4x8x8", ("runs/llama3_70b.gin", "meshes/tpu_v5p.gin"), (*_TEXT, "BATCH_SIZE=256")),
    "Mixtral 8x7B": Layout(
        "v5p:4x4x4",
        ("runs/mixtral_8x7b.gin", "meshes/tpu_v5p.gin"),
        (*_CORPUS, "BATCH_SIZE=64", "TENSOR=1", "MeshConfig.expert=8", "MeshConfig.xla_profile='v5p_moe'"),
    ),
    "T5 1.1 XXL": Layout(
        "v5e:16x16",
        ("runs/t5_1_1_base_c4.gin", "models/t5_1_1_xxl.gin", "meshes/tpu_v5e.gin"),
        (*_CORPUS, "BATCH_SIZE=512", "TENSOR=4", "StackConfig.remat='full'"),
    ),
}


def plan_of(layout: Layout) -> Plan:
    experiment = parse_config(list(layout.files), list(layout.bindings)).build(Experiment)
    return compile_plan(Request(experiment, parse_topology(layout.topology), known_vocabulary(experiment)), CACHE)


def layout_row(name: str, layout: Layout) -> list[str]:
    plan = plan_of(layout)
    memory = plan.memory
    return [
        name,
        layout.topology,
        " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1),
        f"{plan.tokens_per_step:,}",
        f"{memory.arguments / GiB:.2f}",
        f"{(memory.total - memory.arguments - memory.working.get('program', 0)) / GiB:.2f}",
        "" if plan.out_of_memory else f"{plan.cycles / 1e6:,.0f}",
        "does not fit" if plan.out_of_memory else duration(plan.seconds),
        "" if plan.out_of_memory else f"{plan.mfu:.1%}",
        plan.versions,
    ]


def layouts_table(names: list[str]) -> str:
    """Compiles the named layouts, and keeps their rows beside those compiled before."""
    rows = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in names or LAYOUTS:
        rows[name] = layout_row(name, LAYOUTS[name])
        print(*rows[name], sep=" | ", flush=True)
        KEPT.write_text(json.dumps(rows, indent=2) + "\n")
    header = ["model", "slice", "mesh", "tokens", "arguments", "temporaries", "million cycles", "step", "MFU", "by"]
    return table(header, [rows[name] for name in LAYOUTS if name in rows])


def schedules_table() -> str:
    """MiB of temporaries per device, and of the input of a stage for one microbatch."""
    counts = (4, 8, 16, 32)
    script = "import sys; from tests.models.test_loss_gradient import temporaries; "
    rows = []
    for schedule in ("gpipe", "1f1b"):
        code = f"{script}print(*(temporaries({schedule!r}, count) for count in {counts}))"
        # In a process of its own, whose virtual devices tests/conftest.py asks for.
        output = subprocess.run(
            [sys.executable, "-c", f"import tests.conftest; {code}"], cwd=PAGE.parents[1], stdout=subprocess.PIPE
        ).stdout
        rows.append([schedule, *(f"{int(size) / 2**20:.2f}" for size in output.split())])
    return table(["schedule", *(f"M = {count}" for count in counts)], rows)


def matrix_table(files: list[Path]) -> str:
    """For each mesh the largest error of a gradient, relative to the largest entry of its parameter."""
    cells: dict[str, dict[str, str]] = {}
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        if not case.get("name", "").startswith("test_the_whole_matrix["):
            continue
        model, _, mesh = case.get("name")[len("test_the_whole_matrix[") : -1].partition("-")
        errors = [p.get("value") for p in case.iter("property") if p.get("name") == "error"]
        failed = case.find("failure") is not None or case.find("error") is not None
        cells.setdefault(mesh, {})[model] = "**fails**" if failed else errors[0] if errors else "refused"
    rows = [[mesh.replace("-", " x "), *(by_model.get(m, "") for m in MODELS)] for mesh, by_model in cells.items()]
    return table(["mesh", *MODELS], sorted(rows, key=lambda row: (row[0].count(" x "), row[0])))


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def replaced(page: str, name: str, content: str) -> str:
    """The page with `content` between the marks of this name."""
    before, begin, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert begin, name
    assert end, name
    return f"{before}{begin}{content}\n{end}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=None)
    parser.add_argument("--schedules", action="store_true")
    parser.add_argument("--matrix", type=Path, nargs="+")
    options = parser.parse_args()
    page = PAGE.read_text()
    if options.layouts is not None:
        page = replaced(page, "layouts", layouts_table(options.layouts))
    if options.schedules:
        page = replaced(page, "schedules", schedules_table())
    if options.matrix:
        page = replaced(page, "matrix", matrix_table(options.matrix))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
