"""The pass over all units: which documents and lines are kept, written as `verdicts-N.npz` of every unit.

Memory: 60 bytes for each document of the corpus in the main process and 40 in each worker; with lines, 9 bytes for each
hashed line and 3 GB. Signatures stay on disk (512 bytes for each document by default) and are read through a map.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from t5x_like.data.prepare.config import Deduplication
from t5x_like.data.prepare.deduplicate import first_occurrences, first_of_components, similar_pairs
from t5x_like.data.prepare.engine import Engine
from t5x_like.data.prepare.passes import DUPLICATE, KEPT, NEAR_DUPLICATE, name
from t5x_like.data.prepare.signatures import NearDuplicates
from t5x_like.data.prepare.work import Unit, write_json
from t5x_like.files import new_file

_LINES_AT_ONCE = 2**26
_CHOSEN, _BANDS, _BITS = "chosen.npy", "bands.npy", "bits.npy"


def find_duplicates(units: Sequence[Unit], config: Deduplication, work: Path, engine: Engine):
    """Writes the verdicts of all units."""
    done = work / "verdicts.json"
    if done.exists():
        return
    texts = [_load(work, unit, "texts") for unit in units]
    sizes = [len(some) for some in texts]
    together = np.concatenate([np.zeros(0, np.uint64), *texts])
    chosen = first_occurrences(together) if config.documents else np.ones(len(together), bool)
    del texts, together
    verdicts = np.where(chosen, KEPT, DUPLICATE).astype(np.uint8)
    if config.near and chosen.any():
        near = _near_duplicates(units, sizes, config.near, chosen, work, engine)
        verdicts[near] = NEAR_DUPLICATE
    lines = _kept_lines(units, sizes, verdicts == KEPT, work) if config.lines else [np.zeros(0, bool)] * len(units)
    for unit, documents, kept in zip(units, _split(verdicts, sizes), lines, strict=True):
        with new_file(work / name("verdicts", unit.number, ".npz")) as aside:
            np.savez(aside, documents=documents, lines=kept)
    write_json(done, {})


def _load(work: Path, unit: Unit, array: str) -> np.ndarray:
    with np.load(work / name("hashes", unit.number, ".npz")) as arrays:
        return arrays[array]


def _split(array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(sizes)[:-1])


def _near_duplicates(
    units: Sequence[Unit],
    sizes: Sequence[int],
    config: NearDuplicates,
    chosen: Bool[np.ndarray, "documents"],
    work: Path,
    engine: Engine,
) -> Bool[np.ndarray, "documents"]:
    """Marks the chosen documents that are near duplicates of an earlier one."""
    count = sum(sizes)
    bands = np.lib.format.open_memmap(work / _BANDS, "w+", np.uint64, (config.num_bands, count))
    bits = np.lib.format.open_memmap(work / _BITS, "w+", np.uint8, (count, config.num_bands * config.rows_per_band))
    start = 0
    for unit, size in zip(units, sizes, strict=True):
        bands[:, start : start + size] = _load(work, unit, "bands")
        bits[start : start + size] = _load(work, unit, "bits")
        start += size
    bands.flush()
    bits.flush()
    del bands, bits
    np.save(work / _CHOSEN, chosen)
    numbers = range(config.num_bands)
    engine.run(functools.partial(compare_band, config=config, work=work), numbers, "Finding near duplicates")
    pairs = (np.load(work / name("pairs", number, ".npy")) for number in numbers)
    return first_of_components(pairs, count) != np.arange(count)


def compare_band(number: int, config: NearDuplicates, work: Path):
    """Writes the pairs of similar documents that agree in a band."""
    done = work / name("pairs", number, ".npy")
    if done.exists():
        return
    band = np.load(work / _BANDS, mmap_mode="r")[number]
    bits: UInt8[np.ndarray, "documents hashes"] = np.load(work / _BITS, mmap_mode="r")
    pairs = similar_pairs(np.array(band), bits, np.load(work / _CHOSEN), config.threshold)
    with new_file(done) as aside:
        np.save(aside, pairs)


def _kept_lines(
    units: Sequence[Unit], sizes: Sequence[int], chosen: Bool[np.ndarray, "documents"], work: Path
) -> list[Bool[np.ndarray, "lines"]]:
    """By unit, whether each hashed line is the first of its kind in the chosen documents."""
    hashes, counts, live = [], [], []
    for unit, here in zip(units, _split(chosen, sizes), strict=True):
        hashes.append(_load(work, unit, "lines"))
        counts.append(len(hashes[-1]))
        live.append(np.repeat(here, _load(work, unit, "num_lines")))
    together, live = np.concatenate(hashes), np.concatenate(live)
    del hashes
    kept = np.zeros(len(together), bool)
    num_parts = -(-len(together) // _LINES_AT_ONCE) or 1
    kept[live] = first_occurrences(together[live], num_parts)
    return _split(kept, counts)
