"""The nearest neighbours of points by cosine, which duplicates, graph clustering, learned heads and maps share.

Exact up to `EXACT` points, above that by faiss's inverted lists (IVF), probed as widely as a sample of exact answers
asks for. Equally similar neighbours come in the order of their indices, which no search engine promises by itself.

N points to search in, Q queries, D dimensions, M neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust import seeding
from deepclust.clustering.kmeans import engine_used

try:
    import faiss
except ImportError:  # as in kmeans.py: torch then searches, exactly
    faiss = None  # type: ignore[assignment]

EXACT = 100_000  # points up to which every similarity is computed
RECALL = 0.95  # of the approximate search, on a sample
_SAMPLE = 500  # queries that measure it
_BLOCK_CPU, _BLOCK_GPU = 1 << 24, 1 << 27  # similarities in memory at once
_QUERIES = 1 << 12  # that faiss takes at once; fewer a call take nearly twice the time
_ROWS = 1 << 13  # points that are copied at once


class Neighbours(NamedTuple):
    """The nearest neighbours of each query, the nearest first.

    Attributes:
        indices: (Q, M) int64.
        similarities: (Q, M) float32, cosines; that of a point of length 0 is 0.
        recall: Share of the true neighbours that were found, measured on a sample; 1 for an exact search.
    """

    indices: Tensor
    similarities: Tensor
    recall: float = 1.0


def graph(points_ND: Tensor, count: int) -> Neighbours:
    """The neighbours of each point among the others.

    Args:
        points_ND: float32, at least two.
        count: Neighbours of each; at most N - 1.
    """
    count = min(count, len(points_ND) - 1)
    found = search(points_ND, points_ND, count + 1)
    # Among copies of one point, itself may be further back, or, where there are more copies than neighbours, absent.
    own = found.indices == torch.arange(len(points_ND), device=found.indices.device)[:, None]
    own[:, -1] |= ~own.any(1)
    shape = (len(points_ND), count)
    return Neighbours(found.indices[~own].view(shape), found.similarities[~own].view(shape), found.recall)


def search(queries_QD: Tensor, points_ND: Tensor, count: int) -> Neighbours:
    """The points nearest to each query.

    Args:
        queries_QD: float32.
        points_ND: float32, on the same device; a memory map is read block by block.
        count: Neighbours of each query; at most N.
    """
    count = min(count, len(points_ND))
    if len(points_ND) > EXACT and faiss is not None and queries_QD.device.type == "cpu":
        return _approximate(queries_QD, points_ND, count)
    return _exact(queries_QD, points_ND, count)


def _exact(queries: Tensor, points: Tensor, count: int) -> Neighbours:
    device = queries.device
    indices = torch.empty(len(queries), count, dtype=torch.int64, device=device)
    similarities = torch.empty(len(queries), count, device=device)
    unit = F.normalize(points.float(), dim=1)
    by_faiss = engine_used("faiss", device) == "faiss" and device.type == "cpu"
    rows = max(1, (_BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU) // len(points))
    if by_faiss:
        rows = max(rows, _QUERIES)
    for start in range(0, len(queries), rows):
        block = F.normalize(queries[start : start + rows].float(), dim=1)
        if by_faiss:
            found, places = faiss.knn(block.numpy(), unit.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
            values, nearest = torch.from_numpy(found), torch.from_numpy(places)
        else:
            values, nearest = (block @ unit.T).topk(count, dim=1)
        indices[start : start + rows], similarities[start : start + rows] = _ordered(nearest, values)
    return Neighbours(indices, similarities)


def _ordered(indices: Tensor, similarities: Tensor) -> tuple[Tensor, Tensor]:
    """By falling similarity, equal ones by rising index."""
    by_index = indices.argsort(dim=1)
    indices, similarities = indices.gather(1, by_index), similarities.gather(1, by_index)
    by_similarity = similarities.argsort(dim=1, descending=True, stable=True)
    return indices.gather(1, by_similarity), similarities.gather(1, by_similarity)


def _approximate(queries: Tensor, points: Tensor, count: int) -> Neighbours:
    """By inverted lists, of which so many are looked into that `RECALL` of a sample's true neighbours are found."""
    dim = points.shape[1]
    lists = int(4 * len(points) ** 0.5)
    index: Any = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.min_points_per_centroid = 1234, 1
    order = torch.randperm(len(points), generator=seeding.generator("neighbours", len(points)))
    index.train(F.normalize(points[order[: 64 * lists]].float(), dim=1).numpy())
    for start in range(0, len(points), _ROWS):
        index.add(F.normalize(points[start : start + _ROWS].float(), dim=1).numpy())
    sample = queries[torch.randperm(len(queries), generator=seeding.generator("recall"))[:_SAMPLE]]
    truth = _sampled(sample, points, count)
    recall, index.nprobe = 0.0, 4
    while recall < RECALL and index.nprobe < lists:
        index.nprobe = min(lists, 2 * index.nprobe)
        _, found = index.search(F.normalize(sample.float(), dim=1).numpy(), count)
        recall = float((torch.from_numpy(found)[:, :, None] == truth[:, None, :]).any(2).float().mean())
    indices = torch.empty(len(queries), count, dtype=torch.int64)
    similarities = torch.empty(len(queries), count)
    for start in range(0, len(queries), _ROWS):
        block = F.normalize(queries[start : start + _ROWS].float(), dim=1).numpy()
        values, nearest = map(torch.from_numpy, index.search(block, count))
        assert (nearest >= 0).all(), "fewer neighbours than asked for in the lists that were probed"
        indices[start : start + _ROWS], similarities[start : start + _ROWS] = _ordered(nearest, values)
    return Neighbours(indices, similarities, recall)


def _sampled(sample: Tensor, points: Tensor, count: int) -> Tensor:
    """Exact neighbours (sample, count) of a few queries, without a copy of the points."""
    unit = F.normalize(sample.float(), dim=1)
    best = unit.new_empty(len(sample), 0)
    places = torch.empty(len(sample), 0, dtype=torch.int64)
    for start in range(0, len(points), _ROWS):
        block = unit @ F.normalize(points[start : start + _ROWS].float(), dim=1).T
        numbers = torch.arange(start, start + block.shape[1]).expand(len(sample), -1)
        best, places = torch.cat([best, block], 1), torch.cat([places, numbers], 1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1)
        places = places.gather(1, kept)
    return places
