"""Near-duplicate documents by MinHash (rensa) and locality-sensitive hashing.

A signature holds `permutations` minima; the share of equal minima of two signatures estimates the Jaccard
similarity J of their shingle sets. Signatures are cut into bands of r minima; documents that agree in a whole
band are compared. r is the largest for which a pair at the threshold is compared with probability 0.99, so
bands decide what is compared, never what is removed.

Pairs at or above the threshold are joined, and the first document of each connected set, in input order, is
kept. So every removed document is near one that comes before it, which is kept or near one before it, and so
on: a chain can reach further than the threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] - compiled

from fbs_rl.data.shingles import mix

ALGORITHM = f"rensa {RMinHash.ALGORITHM_VERSION}"
_SEED = 7
_EMPTY = np.uint32(2**32 - 1)
_RECALL_AT_THRESHOLD = 0.99
_PAIRS_AT_ONCE = 2**14


def signatures(shingles: Sequence[np.ndarray], permutations: int) -> np.ndarray:
    """uint32 [documents, permutations] of the documents' hashed shingles (uint64 each)."""
    if not shingles:
        return np.zeros((0, permutations), np.uint32)
    ends = np.cumsum([0] + [len(one) for one in shingles])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), ends, permutations, _SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32)


@functools.lru_cache(maxsize=8)
def band_rows(threshold: float, permutations: int) -> int:
    """r: minima in a band."""
    best = 1
    for rows in range(1, permutations + 1):
        missed = (1 - threshold**rows) ** (permutations // rows)
        if 1 - missed >= _RECALL_AT_THRESHOLD:
            best = rows
    return best


def band_keys(signature_DP: np.ndarray, threshold: float) -> np.ndarray:
    """uint64 [bands, documents]: equal where a whole band is. Different bands may give equal keys by chance.

    Documents without shingles get keys of their own nowhere: mask them with `has_shingles`.
    """
    documents, permutations = signature_DP.shape
    rows = band_rows(threshold, permutations)
    bands = permutations // rows
    grouped = signature_DP[:, : bands * rows].reshape(documents, bands, rows).astype(np.uint64)
    key_DB = np.zeros((documents, bands), np.uint64)
    for row in range(rows):
        key_DB = mix(key_DB + grouped[:, :, row])
    return np.ascontiguousarray(key_DB.T)


def has_shingles(signature_DP: np.ndarray) -> np.ndarray:
    """Which documents have any: a text of punctuation alone has none, and is near nothing."""
    return (signature_DP != _EMPTY).any(axis=1)


class Clusters:
    """Which documents belong together; the first of each set, in input order, stands for it."""

    def __init__(self, documents: int) -> None:
        self._parent = np.arange(documents, dtype=np.int64)

    def first_of(self, member: np.ndarray) -> np.ndarray:
        """The first document of each one's set."""
        root = self._parent[member]
        while (moved := self._parent[root] != root).any():
            root = np.where(moved, self._parent[root], root)
        return root

    def join(self, one: int, other: int) -> None:
        roots = [self._root(one), self._root(other)]
        self._parent[max(roots)] = min(roots)

    def _root(self, member: int) -> int:
        path = []
        while (above := int(self._parent[member])) != member:
            path.append(member)
            member = above
        self._parent[path] = member
        return member


def join_similar(
    clusters: Clusters,
    keys: np.ndarray,
    documents: np.ndarray,
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
    threshold: float,
) -> int:
    """Join the documents of one band whose keys are equal and whose signatures agree; returns pairs compared.

    keys: uint64 of each of `documents` (ascending numbers). Each bucket is gone through by leaders: its first
    document is compared with all others, those that match leave, and so on with the rest.
    """
    compared = 0
    for leader, member in _leader_rounds(clusters, keys, documents, similarity, threshold):
        compared += len(leader)
        for one, other in zip(leader.tolist(), member.tolist(), strict=True):
            clusters.join(one, other)
    return compared


def _leader_rounds(
    clusters: Clusters,
    keys: np.ndarray,
    documents: np.ndarray,
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
    threshold: float,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    while True:
        shared = _in_runs(keys)
        keys, documents = keys[shared], documents[shared]
        if not len(keys):
            return
        opens = np.append(True, keys[1:] != keys[:-1])
        leader = documents[np.flatnonzero(opens)[np.cumsum(opens) - 1]]
        near = opens | (clusters.first_of(leader) == clusters.first_of(documents))
        open_pairs = np.flatnonzero(~near)
        for start in range(0, len(open_pairs), _PAIRS_AT_ONCE):
            pairs = open_pairs[start : start + _PAIRS_AT_ONCE]
            matched = pairs[similarity(leader[pairs], documents[pairs]) >= threshold]
            near[matched] = True
            yield leader[matched], documents[matched]
        keys, documents = keys[~near], documents[~near]


def _in_runs(keys: np.ndarray) -> np.ndarray:
    """Which of the sorted keys have an equal neighbour."""
    if not len(keys):
        return np.zeros(0, bool)
    same = keys[1:] == keys[:-1]
    return np.append(same, False) | np.append(False, same)
