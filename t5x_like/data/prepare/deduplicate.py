"""Which documents and lines are duplicates, from hashes alone; the first in the order of the corpus stays.

Memory is bounded by the numbers of documents and lines, not by their texts: see each function.
"""

import itertools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64

_PAIRS_AT_ONCE = 2**15


def first_occurrences(hashes: UInt64[np.ndarray, "n"], num_parts: int = 1) -> Bool[np.ndarray, "n"]:
    """Marks the first of equal hashes. Memory: n / num_parts * 40 bytes, beside the hashes and the result."""
    first = np.zeros(len(hashes), bool)
    part_of = hashes >> np.uint64(48)  # 16 bits: parts are nearly equal.
    bounds = np.linspace(0, 2**16, num_parts + 1).astype(np.uint64)
    for low, high in itertools.pairwise(bounds):
        members = np.flatnonzero((part_of >= low) & (part_of < high)) if num_parts > 1 else np.arange(len(hashes))
        first[members[np.unique(hashes[members], return_index=True)[1]]] = True
    return first


def similar_pairs(
    band: UInt64[np.ndarray, "documents"],
    bits: UInt8[np.ndarray, "documents hashes"],
    participates: Bool[np.ndarray, "documents"],
    threshold: float,
) -> Int64[np.ndarray, "pairs 2"]:
    """Pairs (later, earlier) of documents that agree in this band and whose signatures are similar.

    Every document is compared with the previous one of the same key, and with the first. Memory: 40 bytes for each
    document; `bits` is read in parts and may be a memory map.

    Args:
      band: A key for each document.
      bits: Their signatures.
      participates: False for documents that are left out (those dropped already).
      threshold: Smallest estimated Jaccard similarity.
    """
    documents = np.flatnonzero(participates)
    order = documents[np.argsort(band[documents], kind="stable")]
    keys = band[order]
    is_first = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
    later = np.flatnonzero(~is_first)
    group_start = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    candidates = np.concatenate(
        [
            np.stack([order[later], order[later - 1]], axis=1),
            np.stack([order[later], order[group_start[later]]], axis=1)[group_start[later] != later - 1],
        ]
    )
    similar = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(candidates), _PAIRS_AT_ONCE):
        pairs = candidates[start : start + _PAIRS_AT_ONCE]
        similar.append(pairs[estimated_similarity(bits[pairs[:, 0]], bits[pairs[:, 1]]) >= threshold])
    return np.concatenate(similar)


def estimated_similarity(a: UInt8[np.ndarray, "pairs hashes"], b: UInt8[np.ndarray, "pairs hashes"]) -> np.ndarray:
    """Jaccard similarity from the share of equal signature bytes, less those that are equal by chance."""
    return ((a == b).mean(axis=1) - 1 / 256) / (1 - 1 / 256)


def first_of_components(
    pairs: Iterable[Int64[np.ndarray, "pairs 2"]], num_documents: int
) -> Int64[np.ndarray, "documents"]:
    """The first document among those that each document is connected with by the pairs; itself if with none.

    Memory: 40 bytes for each document, and the pairs of one item at a time.
    """
    # Imported here: workers, which load this module, need it not.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first = np.arange(num_documents)
    for some in pairs:
        edges = np.concatenate([some, np.stack([np.arange(num_documents), first], axis=1)])
        graph = coo_array((np.ones(len(edges), bool), edges.T), shape=(num_documents, num_documents))
        _, labels = connected_components(graph, directed=False)
        first = np.unique(labels, return_index=True)[1][labels]
    return first
