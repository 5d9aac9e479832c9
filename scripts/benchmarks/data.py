"""Data: speed of `prepare` and of the loader, precision of near-duplicate detection, memory as the corpus grows.

python scripts/benchmarks/data.py prepare    # MB/s of one process, stage by stage
python scripts/benchmarks/data.py loader     # tokens/s and planning time at length 2,048
python scripts/benchmarks/data.py duplicates # recall and false positives against exact Jaccard similarity
python scripts/benchmarks/data.py memory     # of deduplication: 10,000, 100,000, 1,000,000 documents
"""

import gzip
import io
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from t5x_like.data.batches import row_numbers
from t5x_like.data.build import build_data
from t5x_like.data.config import DataConfig
from t5x_like.data.loader import Loader
from t5x_like.data.prepare import passes
from t5x_like.data.prepare.config import Deduplication, PrepareConfig
from t5x_like.data.prepare.deduplicate import first_of_components, similar_pairs
from t5x_like.data.prepare.document import Document
from t5x_like.data.prepare.engine import LocalEngine
from t5x_like.data.prepare.run import prepare
from t5x_like.data.prepare.signatures import NearDuplicates, signature
from t5x_like.data.prepare.stages.filters import C4Filter, FineWebFilter, GopherQualityFilter, GopherRepetitionFilter
from t5x_like.data.prepare.stages.text import MaskPersonalData, NormalizeText
from t5x_like.data.prepared import PreparedSource
from t5x_like.data.python_library import PythonLibrarySource
from t5x_like.data.randomness import keys, permute
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import ByteTokenizerConfig

QUIET = Console(file=io.StringIO())
STAGES = (
    NormalizeText(),
    GopherRepetitionFilter(),
    GopherQualityFilter(),
    C4Filter(terminal_punctuation=("",), min_sentences=0),
    FineWebFilter(min_punctuated_lines=0, max_lines_per_word=10),
    MaskPersonalData(),
)


def page_texts(num_documents: int) -> list[str]:
    """Pieces of Python's language reference of a web page's size (3 KB), so that many pass the filters."""
    text = "\n\n".join(PythonLibrarySource(parts=("docs",)).documents()).replace("{", "(")
    starts = np.random.default_rng(0).integers(0, len(text) - 6000, num_documents)
    return [text[start : start + 500 + start % 5000] for start in starts.tolist()]


def measure_prepare():
    texts = page_texts(4000)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB of text; one process\n")
    print(f"{'stage by stage':<30}{'MB/s':>8}")
    steps = {type(stage).__name__: lambda text, stage=stage: stage.process(Document(text, "", "")) for stage in STAGES}
    steps["MinHash signature"] = lambda text: signature(text, NearDuplicates())
    for name, step in steps.items():
        start = time.process_time()
        for text in texts:
            step(text)
        print(f"{name:<30}{size / 1e6 / (time.process_time() - start):>8.1f}")
    default, nothing = (NormalizeText(),), Deduplication(documents=False, near=None)
    subwords = SentencePieceConfig(vocab_size=8192, sample_size=1_000_000)
    runs = {
        "normalized only, bytes": (default, nothing, ByteTokenizerConfig()),
        "+ near duplicates": (default, Deduplication(), ByteTokenizerConfig()),
        "all filters, bytes": (STAGES, nothing, ByteTokenizerConfig()),
        "+ near duplicates, SentencePiece BPE": (STAGES, Deduplication(), subwords),
    }
    print(f"\n{'from JSON lines to shards':<44}{'cleaning MB/s':>15}{'tokenizing MB/s':>17}")
    for name, (stages, deduplication, tokenizer) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "in.jsonl")
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            options = {"stages": stages, "deduplication": deduplication, "tokenizer": tokenizer}
            clock = _Clock()
            prepare(PrepareConfig(files=str(source), directory=f"{folder}/out", **options), clock)
        speeds = (size / 1e6 / clock.seconds[label] for label in ("Cleaning", "Tokenizing"))
        print(f"{name:<44}{next(speeds):>15.1f}{next(speeds):>17.1f}", flush=True)


class _Clock(LocalEngine):
    """Times the passes."""

    def __init__(self):
        super().__init__(1, console=QUIET)
        self.seconds = {}

    def run(self, function, items, label):
        start = time.process_time()
        super().run(function, items, label)
        self.seconds[label] = time.process_time() - start


def measure_loader():
    length, batch_size, num_steps = 2048, 32, 100
    texts = page_texts(6000)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl.gz")
        with gzip.open(source, "wt", 1) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        no_stages = {"stages": (), "deduplication": Deduplication(documents=False, near=None)}
        config = PrepareConfig(
            files=str(source), directory=f"{folder}/out", tokenizer=ByteTokenizerConfig(), **no_stages
        )
        prepare(config, LocalEngine(1, console=QUIET))
        print("layout, threads: million tokens/s by the clock | by processor time; planning | reading of a step")
        for layout, threads in itertools.product(("concatenate", "pack"), (1, 2)):
            source = PreparedSource(directory=f"{folder}/out")
            data = build_data(
                DataConfig(
                    source=source,
                    tokenizer=None,
                    layout=layout,
                    sequence_length=length,
                    batch_size=batch_size,
                    validation_fraction=0.01,
                ),
                None,
            )
            batches = data.train
            with Loader(batches.batch, 0, num_steps, num_threads=threads) as loader:
                next(loader)
                clock, processor = time.perf_counter(), time.process_time()
                for _ in loader:
                    pass
                tokens = (num_steps - 1) * batch_size * length / 1e6
                speeds = tokens / (time.perf_counter() - clock), tokens / (time.process_time() - processor)
            start = time.process_time()
            for step in range(num_steps):
                epoch, index = np.divmod(row_numbers(step, batch_size, slice(None)), batches.layout.num_rows)
                batches.layout.read(permute(index, keys(0, epoch), batches.layout.num_rows))
            planning = (time.process_time() - start) / num_steps
            start = time.process_time()
            for step in range(num_steps):
                batches.batch(step)
            reading = (time.process_time() - start) / num_steps
            print(
                f"{layout}, {threads}: {speeds[0]:.1f} | {speeds[1]:.1f}; "
                f"{planning * 1e3:.2f} | {reading * 1e3:.2f} ms",
                flush=True,
            )


def measure_duplicates():
    config, rng = NearDuplicates(), random.Random(0)
    texts = list(_families(rng, num_families=300))
    shingles = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in map(str.split, texts)]
    start = time.process_time()
    bands, bits = (np.array(column) for column in zip(*(signature(text, config) for text in texts), strict=True))
    everyone = np.ones(len(texts), bool)
    pairs = np.concatenate([similar_pairs(band, bits, everyone, config.threshold) for band in bands.T])
    first = first_of_components([pairs], len(texts))
    seconds = time.process_time() - start
    jaccard = lambda a, b: len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
    family = np.arange(len(texts)) // _FAMILY
    close = {}
    for number in range(family.max() + 1):
        for a, b in itertools.combinations(np.flatnonzero(family == number).tolist(), 2):
            close[a, b] = jaccard(a, b)
    print(f"{len(texts):,} documents in {seconds:.1f} s; near duplicates by signature: threshold {config.threshold}")
    for low, high in ((0.8, 0.85), (0.85, 0.9), (0.9, 1.01), (0.8, 1.01)):
        inside = [pair for pair, value in close.items() if low <= value < high]
        recall = np.mean([first[a] == first[b] for a, b in inside])
        print(f"recall of pairs with Jaccard similarity in [{low}, {min(high, 1)}]: {recall:.4f} of {len(inside):,}")
    found = {tuple(sorted(pair)) for pair in pairs.tolist()}
    exact = np.array([jaccard(a, b) for a, b in found])
    for limit in (0.7, 0.65):
        print(f"pairs found with an exact similarity below {limit}: {np.mean(exact < limit):.4f} of {len(found):,}")
    dropped = np.flatnonzero(first != np.arange(len(texts)))
    best = np.array([max(jaccard(a, b) for b in np.flatnonzero(family[:a] == family[a])) for a in dropped])
    print(f"documents dropped without an earlier one of similarity 0.7: {np.mean(best < 0.7):.4f} of {len(dropped):,}")


_FAMILY = 8


def _families(rng, num_families):
    """Families of a text and copies with up to 12 % of the words replaced; every sixth word begins another shingle."""
    for _ in range(num_families):
        words = [f"w{rng.randrange(50_000)}" for _ in range(rng.randrange(100, 800))]
        for _ in range(_FAMILY):
            copy = list(words)
            for place in rng.sample(range(len(words)), int(len(words) * rng.uniform(0, 0.08))):
                copy[place] = f"x{rng.randrange(50_000)}"
            yield " ".join(copy)


def measure_memory():
    print(f"{'documents':>12}{'peak MB':>10}{'seconds':>10}")
    for count in (10_000, 100_000, 1_000_000):
        code = f"import sys; sys.argv = ['', 'dedup', '{count}']; exec(open({__file__!r}).read())"
        subprocess.run([sys.executable, "-c", code], check=True)


def deduplicate_random(count: int):
    """The deduplication of so many documents, of which a tenth are copies, from random hashes."""
    from t5x_like.data.prepare.duplicates import find_duplicates
    from t5x_like.data.prepare.work import Unit

    rng, config, per_unit = np.random.default_rng(0), Deduplication(), 10_000
    with tempfile.TemporaryDirectory() as folder:
        units = [Unit(number, (), 0) for number in range(count // per_unit)]
        for unit in units:
            texts = rng.integers(0, 2**63, per_unit, np.uint64)
            bands = rng.integers(0, 2**63, (32, per_unit), np.uint64)
            bits = rng.integers(0, 256, (per_unit, 256), np.uint8)
            copies = rng.integers(0, per_unit, per_unit // 10)
            bands[:, : len(copies)], bits[: len(copies)] = bands[:, copies], bits[copies]
            np.savez(Path(folder, passes.name("hashes", unit.number, ".npz")), texts=texts, bands=bands, bits=bits)
        start = time.process_time()
        find_duplicates(units, config, Path(folder), LocalEngine(1, console=QUIET))
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count:>12,}{peak:>10,.0f}{seconds:>10.1f}", flush=True)


MEASUREMENTS = {
    "prepare": measure_prepare,
    "loader": measure_loader,
    "duplicates": measure_duplicates,
    "memory": measure_memory,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["dedup"]:
        deduplicate_random(int(sys.argv[2]))
    else:
        for name in sys.argv[1:] or MEASUREMENTS:
            MEASUREMENTS[name]()
