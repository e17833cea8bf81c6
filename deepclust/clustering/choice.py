"""Which clustering is best, without labels: how much the cluster of a neighbour tells about a point's own.

Points of one class are neighbours more often than others, so a clustering is good if neighbours agree and the clusters
still tell points apart: the mutual information I(C; C') of the clusters of a point and of one of its nearest
neighbours. It is what TEMI (arXiv 2303.17896, equation 4) maximises, here of assignments, not of probabilities.
Agreement alone would be perfect with everything in one cluster.

docs/clusters.md states how far it can be trusted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepclust.clustering.neighbours import Neighbours


def information(clusters_N: Tensor, graph: Neighbours, k: int) -> float:
    """I(C; C') / log K, from 0 (neighbours say nothing) to 1 (K clusters of equal size, in which all neighbours agree).

    Args:
        clusters_N: int64 cluster of each point, from 0 to K - 1; points of -1 are left out.
        graph: The nearest neighbours of each point.
        k: Number of clusters, at least two.
    """
    own = clusters_N[:, None].expand_as(graph.indices)
    others = clusters_N[graph.indices]
    both = (own >= 0) & (others >= 0)
    joint = torch.bincount(own[both] * k + others[both], minlength=k * k).view(k, k).double()
    if not joint.any():
        return 0.0
    joint = (joint + joint.T) / (2 * joint.sum())
    return max(0.0, 2 * _entropy(joint.sum(0)) - _entropy(joint)) / math.log(k)


def _entropy(probabilities: Tensor) -> float:
    return -float(torch.special.xlogy(probabilities, probabilities).sum())
