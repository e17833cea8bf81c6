"""The information of neighbours is scikit-learn's mutual information of the clusters at both ends of every edge."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from deepclust.clustering import choice, neighbours

GRAPH = neighbours.graph(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), 5)


def test_information_is_that_of_the_clusters_at_the_ends_of_all_edges() -> None:
    clusters = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))
    own, others = clusters.repeat_interleave(5), clusters[GRAPH.indices].flatten()
    both = mutual_info_score(torch.cat([own, others]), torch.cat([others, own]))
    assert choice.information(clusters, GRAPH, 3) == pytest.approx(both / math.log(3))


def test_one_cluster_tells_nothing_and_equal_ones_without_edges_between_them_all() -> None:
    assert choice.information(torch.zeros(60, dtype=torch.int64), GRAPH, 4) == 0
    assert choice.information(torch.full((60,), -1), GRAPH, 4) == 0
    blocks = torch.eye(4).repeat_interleave(6, 0)
    found = choice.information(torch.arange(4).repeat_interleave(6), neighbours.graph(blocks, 5), 4)
    assert found == pytest.approx(1)


def test_points_without_a_cluster_are_left_out() -> None:
    clusters = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))
    clusters[::7] = -1
    edges = [(a, b) for a, row in zip(clusters.tolist(), clusters[GRAPH.indices].tolist(), strict=True) for b in row]
    kept = [pair for a, b in edges if a >= 0 <= b for pair in ((a, b), (b, a))]
    expected = mutual_info_score(*map(list, zip(*kept, strict=True))) / math.log(3)
    assert choice.information(clusters, GRAPH, 3) == pytest.approx(expected)
