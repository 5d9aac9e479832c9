"""The same batches on processes that have really met, whatever they are: a mixture, packed, of filtered corpora."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.loader import Loader
from t5x_like.data.mixtures import Mixture, MixtureStage
from t5x_like.data.prepare.config import Deduplication, PrepareConfig
from t5x_like.data.prepare.engine import LocalEngine
from t5x_like.data.prepare.run import prepare
from t5x_like.data.prepare.stages.filters import GopherQualityFilter
from t5x_like.data.prepare.stages.text import NormalizeText
from t5x_like.data.prepared import PreparedSource
from t5x_like.data.shards import PREPARED
from t5x_like.data.tokenizers import ByteTokenizerConfig
from t5x_like.sharding.logical import local_rows
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.sharding.placement import Placement
from t5x_like.training.job import batch_target
from tests.data.corpora import random_texts
from tests.reliability.launch import free_port
from tests.reliability.worker import start as meet

STEPS = 60
MIDDLE = 37
FILTER = GopherQualityFilter(min_words=20, min_word_length=1.0, min_stop_words=0)


def corpus(folder: Path, seed: int, count: int) -> str:
    folder.mkdir()
    lines = (json.dumps({"text": text}) + "\n" for text in random_texts(seed, count))
    (folder / "in.jsonl").write_text("".join(lines))
    config = PrepareConfig(
        files=str(folder / "in.jsonl"),
        directory=str(folder / "out"),
        stages=(NormalizeText(), FILTER),
        deduplication=Deduplication(near=None),
        tokenizer=ByteTokenizerConfig(),
        shard_bytes=4000,
    )
    with open(folder / "log", "w") as log:
        prepare(config, LocalEngine(1, console=Console(file=log)))
    return str(folder / "out")


def config(directories: list[str]) -> DataConfig:
    mixture = Mixture(
        sources=tuple(PreparedSource(directory=d) for d in directories),
        rates=(5.0, 3.0, 2.0),
        later=(MixtureStage(start_step=50, rates=(1.0, 1.0, 8.0)),),
    )
    return DataConfig(source=mixture, tokenizer=None, layout="pack", sequence_length=256, batch_size=8)


def hashes(directories: list[str], threads: int, start: int) -> dict[str, str]:
    """Of each row of this process, by step and row."""
    data = build_data(config(directories), None)
    rows = local_rows(batch_target(data.config, Placement(build_mesh(MeshConfig()))))
    numbers = np.arange(8)[rows]
    with Loader(lambda step: data.train.batch(step, rows), start, STEPS - start, num_threads=threads) as loader:
        return {
            f"{step} {number}": hashlib.sha256(b"".join(v[i].tobytes() for _, v in sorted(batch.items()))).hexdigest()
            for step, batch in loader
            for i, number in enumerate(numbers.tolist())
        }


def worker(directories: list[str], threads: int, start: int, port: int, number: int, count: int):
    meet(number, count, port, 8 // count)
    assert jax.process_count() == count
    print(json.dumps(hashes(directories, threads, start)), flush=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("count", "threads", "start"), [(2, 1, 0), (2, 3, MIDDLE), (4, 4, MIDDLE)])
def test_the_trace_of_processes(count, threads, start, tmp_path):
    sizes = {"a": 90, "b": 60, "c": 15}
    directories = [corpus(tmp_path / name, seed, size) for seed, (name, size) in enumerate(sizes.items())]
    kept = [sum(s["documents"] for s in json.loads(Path(d, PREPARED).read_text())["shards"]) for d in directories]
    assert all(0 < left < size for left, size in zip(kept, sizes.values(), strict=True))
    data = build_data(config(directories), None)
    assert (data.train.epochs(STEPS) > 1).all()
    assert data.train.epochs(MIDDLE)[0] % 1
    expected = {key: value for key, value in hashes(directories, 1, 0).items() if int(key.split()[0]) >= start}
    port = free_port()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, tests.data.test_trace as t; t.worker(*eval(sys.argv[1]))",
                repr(arguments),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for arguments in ((directories, threads, start, port, number, count) for number in range(count))
    ]
    try:
        found = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]
    finally:
        for process in started:
            process.kill()
    assert sum(map(len, found)) == len(expected)
    assert {key: value for part in found for key, value in part.items()} == expected
