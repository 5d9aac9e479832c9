"""Every capability with every model on every mesh, by the commands that people type.

A capability is one entry of `CAPABILITIES`: a function that does it on a mesh and compares with one device. A cell that
cannot be stands in `REFUSED` with the message that the command must give. `scripts/document_matrix.py` writes
docs/matrix.md from a run of all cells.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import t5x_like
from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands.main import main
from t5x_like.errors import UserError
from t5x_like.huggingface.convert import load_saved
from t5x_like.reporting.metrics import read_metrics
from t5x_like.sharding.mesh import place
from tests.matrix.models import COMMON, MESHES, MODELS

ONE = "one device"


def sentences() -> Iterator[list[str]]:
    """With something to learn: words follow each other with uneven probabilities."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "from", "dog"])
    for length in rng.integers(4, 12, 500):
        yield list(rng.choice(words, length, p=np.arange(1, 14) / 91))


TEXT = ". ".join(" ".join(words) for words in sentences())
PROMPT = "the cat sat on a mat"


class Refused(Exception):
    """What a command said when it ended with exit code 2."""


class Case(NamedTuple):
    """A cell: a model and a mesh.

    Attributes:
      model: its name.
      mesh: its name.
      home: directory of the model, with its run on one device in `run`.
      work: an empty directory.
      call: runs a command on the devices of the mesh, returns what it prints; raises `Refused`.
    """

    model: str
    mesh: str
    home: Path
    work: Path
    call: Callable[..., str]

    @property
    def on_mesh(self) -> list[str]:
        sizes = {axis: size for axis, size in MESHES[self.mesh].sizes.items() if size > 1}
        return [f"--gin.MeshConfig.{axis}={size}" for axis, size in {"data": 1, **sizes}.items()]

    @property
    def flags(self) -> list[str]:
        return [f"--gin_file={self.home / 'model.gin'}", f"--gin.TEXT_FILES={self.home / 'text.txt'}", *self.on_mesh]


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["split"] == "train"}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, atol=1e-6)


def train(case: Case) -> None:
    case.call("train", *case.flags, f"--gin.MODEL_DIR={case.work / 'run'}")
    same(losses(case.work / "run"), losses(case.home / "run"))


def resume(case: Case) -> None:
    """From the middle of the run on one device."""
    shutil.copytree(case.home / "run", case.work / "run")
    shutil.rmtree(case.work / "run" / "checkpoints" / "4")
    case.call("train", *case.flags, f"--gin.MODEL_DIR={case.work / 'run'}", "--allow_changes=run.model_dir")
    same(losses(case.work / "run"), losses(case.home / "run"))


def evaluate(case: Case) -> None:
    scores = json.loads(case.call("evaluate", f"--model_dir={case.home / 'run'}", *case.on_mesh))
    [*_, expected] = [r for r in read_metrics(case.home / "run" / "metrics.jsonl") if r["split"] == "validation"]
    names = [name for name in scores if isinstance(scores[name], float)]
    assert "loss" in names
    same({name: scores[name] for name in names}, {name: expected[name] for name in names})


def generate(case: Case) -> None:
    """Greedily; on one device against reading the whole text anew for each token."""
    flags = [f"--prompt={PROMPT}", "--prompt=a", "--greedy", "--max_new_tokens=6", *case.on_mesh]
    written = case.call("generate", f"--model_dir={case.home / 'run'}", *flags)
    expected = case.home / "written.txt"
    if case.mesh == ONE:
        expected.write_text(written)
    elif not expected.exists():
        pytest.skip("the cell of one device did not run")
    assert written == expected.read_text()


def score(case: Case) -> None:
    """The likelihood of a text is the product of those of its parts, and that of one device."""
    model = t5x_like.load(case.home / "run", mesh=MESHES[case.mesh])
    try:
        whole, first = model.score([("the cat", " sat on a mat"), ("the cat", " sat on")])
        if not model.config.reads_inputs:
            [second] = model.score([("the cat sat on", " a mat")])
            assert whole.num_tokens == first.num_tokens + second.num_tokens
            np.testing.assert_allclose(whole.log_likelihood, first.log_likelihood + second.log_likelihood, rtol=1e-5)
    except UserError as error:
        raise Refused(str(error)) from error
    assert whole.log_likelihood < first.log_likelihood < 0
    known = case.home / "score.json"
    if case.mesh == ONE:
        known.write_text(json.dumps(whole.log_likelihood))
    elif known.exists():
        np.testing.assert_allclose(whole.log_likelihood, json.loads(known.read_text()), rtol=1e-5)


def export(case: Case) -> None:
    """To Hugging Face's files and back: the same parameters, bit by bit."""
    case.call("convert", f"--from={case.home / 'run'}", f"--to={case.work / 'hf'}")
    case.call("convert", f"--from={case.work / 'hf'}", f"--to={case.work / 'back'}")
    ours, back = (load_saved(RunDirectory(at), place(MESHES[ONE])) for at in (case.home / "run", case.work / "back"))
    by_value = lambda saved: sorted(jax.tree.leaves(saved.params), key=lambda a: (a.shape, np.asarray(a).tobytes()))
    for a, b in zip(by_value(ours), by_value(back), strict=True):
        np.testing.assert_array_equal(a, b)


CAPABILITIES = {
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "generate": generate,
    "score": score,
    "export and import": export,
}

WRITES_NO_TEXT = "writes no text"
NO_FAMILY = "No Hugging Face family"
REFUSED = {
    **{(does, model): WRITES_NO_TEXT for does in ("generate", "score") for model in ("bert", "modernbert")},
    **{("export and import", model): NO_FAMILY for model in ("llama", "t5_experts", "unlike")},
}
"""By capability and model, what the message says."""

DIAGONAL = [
    ("train", "llama", "data=2 x tensor=2"),
    ("resume", "t5", "fsdp=2 x stage=2"),
    ("evaluate", "mixture", "data=2 x tensor=2"),
    ("generate", "deepseek", ONE),
    ("score", "gpt", ONE),
    ("export and import", "bert", ONE),
]
"""Cells of the default suite: each capability and each mesh, on unlike models."""


def cells() -> list:
    found = []
    for does in CAPABILITIES:
        for model in MODELS:
            # Files know no mesh.
            for mesh in [ONE] if does == "export and import" else MESHES:
                marks = [] if (does, model, mesh) in DIAGONAL else [pytest.mark.slow]
                found.append(pytest.param(does, model, mesh, marks=marks, id=f"{does}-{model}-{mesh}"))
    return found


@pytest.fixture
def use_devices(monkeypatch):
    """Leaves so many devices to see."""
    devices = jax.devices
    return lambda count: monkeypatch.setattr(jax, "devices", lambda *backend: devices(*backend)[:count])


@pytest.fixture
def call(capsys):
    """Runs a command."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        said = capsys.readouterr()
        if code == 2:
            raise Refused(said.err)
        assert code == 0, said.err
        return said.out

    return run


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """By model, the directory with its run on one device."""
    return functools.cache(lambda model: tmp_path_factory.mktemp(model))


@pytest.mark.parametrize(("does", "model", "mesh"), cells())
def test_cell(does, model, mesh, homes, use_devices, call, tmp_path, record_property):
    home = homes(model)
    if not (home / "run").exists():
        (home / "text.txt").write_text(TEXT)
        (home / "model.gin").write_text(COMMON + MODELS[model].gin)
        use_devices(1)
        call("train", *Case(model, ONE, home, home, call).flags, f"--gin.MODEL_DIR={home / 'run'}")
    use_devices(math.prod(MESHES[mesh].sizes.values()))
    case, expected = Case(model, mesh, home, tmp_path, call), REFUSED.get((does, model))
    if expected is None:
        CAPABILITIES[does](case)
        return
    with pytest.raises(Refused, match=expected) as refusal:
        CAPABILITIES[does](case)
    record_property("refused", str(refusal.value).strip())
