"""Nearest neighbours by cosine are those that comparing all pairs finds, in an order that no engine decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust.clustering import kmeans, neighbours


def _points(count: int, dim: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(count))


def _by_pairs(queries: Tensor, points: Tensor, count: int, *, others: bool) -> tuple[np.ndarray, np.ndarray]:
    """Indices and cosines by comparing all pairs in float64, equal ones by rising index."""
    q, p = (rows.double().numpy() for rows in (queries, points))
    length = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(p, axis=1)
    cosines = np.divide(q @ p.T, length, out=np.zeros_like(length), where=length > 0).round(6)
    if others:
        np.fill_diagonal(cosines, -2)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_neighbours_are_those_of_all_pairs(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "torch":
        monkeypatch.setattr(neighbours, "faiss", None)
        monkeypatch.setattr(kmeans, "faiss", None)
    monkeypatch.setattr(neighbours, "_BLOCK_CPU", 1 << 12)  # several blocks
    points = _points(300, 7)
    found = neighbours.graph(points, 9)
    indices, cosines = _by_pairs(points, points, 9, others=True)
    assert found.indices.tolist() == indices.tolist()
    assert found.similarities.numpy() == pytest.approx(cosines, abs=2e-6)
    searched = neighbours.search(points[:20] * 5, points, 4)
    assert searched.indices.tolist() == _by_pairs(points[:20], points, 4, others=False)[0].tolist()


def test_copies_come_by_index_and_no_point_is_its_own_neighbour() -> None:
    points = torch.cat([torch.ones(6, 3), _points(4, 3)])
    found = neighbours.graph(points, 3)
    assert found.indices[:6].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    everything = neighbours.graph(points, 50).indices
    assert everything.shape == (10, 9)
    assert all(sorted([own, *row]) == list(range(10)) for own, row in enumerate(everything.tolist()))


def test_a_point_of_length_zero_is_like_nothing() -> None:
    found = neighbours.graph(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), 2)
    assert found.similarities.tolist() == [[0, 0], [1, 0], [1, 0]]


def test_the_approximate_search_finds_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    points = _points(3000, 8)
    exact = neighbours.graph(points, 10).indices
    monkeypatch.setattr(neighbours, "EXACT", 1000)
    found = neighbours.graph(points, 10)
    recall = (found.indices[:, :, None] == exact[:, None, :]).any(2).float().mean().item()
    assert neighbours.RECALL - 0.02 < recall == pytest.approx(found.recall, abs=0.02)
    assert (found.similarities.diff(dim=1) <= 0).all()
    assert (found.indices != torch.arange(3000)[:, None]).all()
    again = neighbours.graph(points, 10)
    assert torch.equal(found.indices, again.indices)
