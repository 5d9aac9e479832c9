"""Writes docs/matrix.md from a run of all cells of the matrix.

python -m pytest tests/matrix -m "slow or not slow" --junitxml=matrix.xml
python scripts/document_matrix.py matrix.xml
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.matrix.models import MESHES, MODELS
from tests.matrix.test_matrix import CAPABILITIES

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
HEAD = """# What works with what

Each cell is a test that ran (`tests/matrix`): a capability with a small model, by the commands that
you type, on one device and on two meshes of four ({meshes}). On a mesh it gives what one device
gives: losses and scores to 1e-5, texts letter by letter. A number is the meshes it was run on.
`scripts/document_matrix.py` wrote this page.
"""


def outcomes(file: Path) -> dict[tuple[str, str], dict[str, str]]:
    """By capability and model: of each mesh, "" where the test passed, the message of a refusal, or "fails"."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = case.get("name", "")
        if not name.startswith("test_cell[") or case.find("skipped") is not None:
            continue
        does, model, mesh = name[len("test_cell[") : -1].split("-")
        failed = case.find("failure") is not None or case.find("error") is not None
        refused = [p.get("value", "") for p in case.iter("property") if p.get("name") == "refused"]
        found.setdefault((does, model), {})[mesh] = "fails" if failed else next(iter(refused), "")
    return found


def page(found: dict[tuple[str, str], dict[str, str]]) -> str:
    reasons: list[str] = []

    def cell(meshes: dict[str, str]) -> str:
        said = set(meshes.values()) - {""}
        if not said:
            return f"yes ({len(meshes)})" if meshes else ""
        if "fails" in said:
            return "**fails**"
        reason = " ".join(said.pop().removeprefix("error: ").splitlines()[0].split())
        if reason not in reasons:
            reasons.append(reason)
        return f"no [{reasons.index(reason) + 1}]"

    header = ["model", *CAPABILITIES]
    rows = [
        [model.title, *(cell(found.get((does, name), {})) for does in CAPABILITIES)] for name, model in MODELS.items()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    meshes = " and ".join(f"`{mesh}`" for mesh in MESHES if mesh != "one device")
    return f"{HEAD.format(meshes=meshes)}\n{table}\n\n## What the commands say\n\n{notes}\n"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    PAGE.write_text(page(outcomes(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
