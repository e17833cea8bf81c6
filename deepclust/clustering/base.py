"""The contract of clustering algorithms: fitted on the features of training images, applied to those of any image.

An algorithm is a file of `deepclust/clustering/algorithms` with its options (`Config`) and a function

    fit(problem: Problem, options: Config) -> Assigner

which draws all randomness from the problem's seed. N points, D dimensions, K clusters, M neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from deepclust.clustering import neighbours
from deepclust.clustering.neighbours import Neighbours

USUAL = 15  # neighbours that algorithms ask for by default
Made = TypeVar("Made")


class Points:
    """Points to cluster, with what several algorithms compute of them, made once.

    Args:
        features_ND: float32, finite, on the device that computes.
    """

    def __init__(self, features_ND: Tensor) -> None:
        self.features = features_ND
        self._graph: Neighbours | None = None
        self._made: dict[Hashable, object] = {}

    def __len__(self) -> int:
        return len(self.features)

    def graph(self, count: int) -> Neighbours:
        """The `count` nearest neighbours of each point by cosine, fewer where there are fewer points.

        Searched for once, with as many neighbours as any algorithm asks for by default.
        """
        if self._graph is None or count > self._graph.indices.shape[1]:
            self._graph = neighbours.graph(self.features, max(count, USUAL))
        return Neighbours(self._graph.indices[:, :count], self._graph.similarities[:, :count], self._graph.recall)

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made at the first call and kept under the name for all fits.

        Args:
            name: Of what is made of these points, with all that it depends on beside them.
            make: Must not depend on the seed of a fit.
        """
        if name not in self._made:
            self._made[name] = make()
        return cast(Made, self._made[name])


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an algorithm is given.

    Attributes:
        points: All training points.
        k: Number of clusters, at least 2 and at most the number of points.
        seed: Decides everything that is drawn.
    """

    points: Points
    k: int
    seed: int

    @property
    def features(self) -> Tensor:
        """(N, D) float32."""
        return self.points.features


def means(points_ND: Tensor, clusters_N: Tensor, k: int) -> Tensor:
    """The mean (K, D) float32 of each cluster's points, in float64; NaN of a cluster without points.

    Args:
        points_ND: float32.
        clusters_N: The cluster of each; points of -1 are left out.
        k: Number of clusters.
    """
    known = clusters_N >= 0
    sums = torch.zeros(k, points_ND.shape[1], dtype=torch.float64, device=points_ND.device)
    for start in range(0, len(points_ND), 1 << 13):
        part = slice(start, start + (1 << 13))
        sums.index_add_(0, clusters_N[part][known[part]], points_ND[part][known[part]].double())
    return (sums / torch.bincount(clusters_N[known], minlength=k)[:, None]).float()
