"""The package as others get it: a wheel, installed in a directory of its own and run from another."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import t5x_like

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("setuptools", minversion="77", reason="an older setuptools writes no wheels (extra: dev)")
    # In a copy: setuptools leaves `build/` and `*.egg-info` beside what it packs.
    for name in ("t5x_like", "gin_configs"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, place / name)
    command = "import setuptools.build_meta; setuptools.build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", command], cwd=place, check=True, capture_output=True)
    return next(place.glob("*.whl"))


def test_the_wheel_carries_what_the_package_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "gin_configs").rglob("*.gin")}
    assert shipped == {name.removeprefix("t5x_like/") for name in names if name.endswith(".gin")}
    assert "t5x_like/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "scripts", "gin_configs"))]
    for line in (f"Version: {t5x_like.__version__}", "License: Apache-2.0", "Description-Content-Type: text/markdown"):
        assert line in metadata.splitlines()


def test_the_wheel_runs_from_another_directory(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = lambda *arguments: subprocess.run(
        [sys.executable, "-m", "t5x_like", *arguments],
        cwd=elsewhere, env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert run("--version") == f"t5x_like {t5x_like.__version__}\n"
    printed = run("train", "--gin_file=runs/quickstart.gin", "--print_config")
    assert f"{tmp_path}/site/t5x_like/gin_configs/models/decoder_tiny.gin" in printed
