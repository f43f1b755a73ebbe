"""Unit vectors to pairs of near neighbours: approximate candidates, exact similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

EXACT_BELOW = 50_000  # vectors; above, candidates come from an inverted file
_BLOCK = 2048  # rows of a similarity block


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs i < j with their cosine, sorted by (i, j).

    Attributes:
        first, second: int64 [P].
        cosine: float64 [P], in [-1, 1].
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)


def normalize_rows(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows [N, D] scaled to length 1; a zero row stays zero and is like nothing."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float32)
    return unit


def nearest_neighbours(
    queries: npt.NDArray[np.float32],
    base: npt.NDArray[np.float32],
    neighbours: int,
    *,
    exact_below: int = EXACT_BELOW,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(inner products, indices into base), both [N, k], by FAISS; k = min(neighbours, len(base)).

    Exact (IndexFlatIP) below `exact_below` base vectors, else an inverted file trained on a fixed
    sample. Missing places hold index -1.
    """
    import faiss

    count, dim = base.shape
    index: Any
    k = min(neighbours, count)
    if count < exact_below:
        index = faiss.IndexFlatIP(dim)
    else:
        lists = max(1, int(np.sqrt(count)))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, min(lists, 32))
        index.train(np.ascontiguousarray(base[:: max(1, count // (40 * lists))]))
    index.add(np.ascontiguousarray(base))
    products, indices = index.search(np.ascontiguousarray(queries), k)
    return products, indices


def candidate_pairs(
    unit: npt.NDArray[np.float32],
    *,
    threshold: float,
    neighbours: int,
    exact_below: int = EXACT_BELOW,
) -> Pairs:
    """Pairs at or above `threshold` among each vector's nearest `neighbours`, without itself."""
    if len(unit) < 2:
        return _empty()
    _, indices = nearest_neighbours(unit, unit, neighbours + 1, exact_below=exact_below)
    rows = np.repeat(np.arange(len(unit)), indices.shape[1])
    columns = indices.reshape(-1).astype(np.int64)
    keep = (columns >= 0) & (columns != rows)
    return _score(unit, rows[keep], columns[keep], threshold)


def all_pairs(unit: npt.NDArray[np.float32], *, threshold: float) -> Pairs:
    """Find every pair at or above `threshold`, in blocks: O(N^2) time, O(N) memory."""
    firsts, seconds = [], []
    for start in range(0, len(unit), _BLOCK):
        block = unit[start : start + _BLOCK] @ unit[start:].T
        rows, columns = np.nonzero(block >= threshold - 1e-4)  # float32; re-scored below
        later = columns > rows
        firsts.append(rows[later] + start)
        seconds.append(columns[later] + start)
    if not firsts:
        return _empty()
    return _score(unit, np.concatenate(firsts), np.concatenate(seconds), threshold)


def _score(
    unit: npt.NDArray[np.float32],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    threshold: float,
) -> Pairs:
    """Distinct pairs with exact cosines (float64), those below the threshold left out."""
    if not len(first):
        return _empty()
    pairs = np.unique(np.stack([np.minimum(first, second), np.maximum(first, second)], 1), axis=0)
    cosine = np.empty(len(pairs))
    for start in range(0, len(pairs), _BLOCK):
        part = pairs[start : start + _BLOCK]
        left, right = unit[part[:, 0]].astype(np.float64), unit[part[:, 1]].astype(np.float64)
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine[start : start + _BLOCK] = (left * right).sum(1) / np.where(lengths > 0, lengths, 1)
    keep = cosine >= threshold
    return Pairs(pairs[keep, 0], pairs[keep, 1], np.clip(cosine[keep], -1.0, 1.0))


def _empty() -> Pairs:
    return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def connected_components(count: int, pairs: Pairs) -> list[list[int]]:
    """Components of two or more of the graph with `count` nodes, each sorted, largest first."""
    parents = list(range(count))

    def find(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        low, high = sorted((find(first), find(second)))
        parents[high] = low
    members: dict[int, list[int]] = {}
    for node in range(count):
        members.setdefault(find(node), []).append(node)
    found = [nodes for nodes in members.values() if len(nodes) > 1]
    return sorted(found, key=lambda nodes: (-len(nodes), nodes))


def star_clusters(count: int, pairs: Pairs) -> list[list[int]]:
    """Return clusters [keeper, member, ...] in which every member is paired with the keeper itself.

    Greedy: the node with the most unclustered partners becomes a keeper; the smaller index wins
    ties. No chaining: two members may be far from each other, but never far from their keeper.
    """
    partners: list[set[int]] = [set() for _ in range(count)]
    for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        partners[first].add(second)
        partners[second].add(first)
    import heapq

    queue = [(-len(near), node) for node, near in enumerate(partners) if near]
    heapq.heapify(queue)
    taken: set[int] = set()
    clusters = []
    while queue:
        degree, node = heapq.heappop(queue)
        if node in taken:
            continue
        free = partners[node] - taken
        if len(free) != -degree:
            if free:
                heapq.heappush(queue, (-len(free), node))
            continue
        clusters.append([node, *sorted(free)])
        taken |= free | {node}
    return clusters
