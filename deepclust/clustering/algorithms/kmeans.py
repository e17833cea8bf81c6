"""k-means (Lloyd, 1982; k-means++, Arthur and Vassilvitskii, 2007); spherical: Dhillon and Modha, 2001.

The algorithm itself is deepclust/clustering/kmeans.py. Under several processes, each fits on its share of the points.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from deepclust import config as options
from deepclust import distributed
from deepclust.clustering import kmeans
from deepclust.clustering.assigners import Assigner, Centroids, Layers
from deepclust.clustering.base import Problem
from deepclust.config import Auto, Count, Flag, config

_RESTARTED, _MOST_RESTARTS = 50_000, 5  # points in all runs of a fit; runs


@config
class Config(options.Config):
    """Options of k-means."""

    iterations: Count = 50
    """Most Lloyd iterations."""
    restarts: Count | Auto = "auto"
    """Runs of each fit, of which the one of the lowest inertia counts; auto: 50,000 / images, from 1 to 5."""
    engine: Literal["faiss", "torch"] = "faiss"
    """What searches for the nearest centroids; torch also stands in where faiss is not installed."""
    spherical: Flag = False
    """By the cosine: points and centroids of unit length."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Fit centroids."""
    points = F.normalize(problem.features, dim=1) if options.spherical else problem.features
    found = kmeans.fit(
        points[distributed.share(len(points))],
        problem.k,
        seed=problem.seed,
        iterations=options.iterations,
        restarts=restarts(options, len(points)),
        spherical=options.spherical,
        engine=options.engine,
    )
    assigner = Centroids.of(found.centroids, points)
    if not options.spherical:
        return assigner
    # The nearest of centroids of unit length is that of the largest cosine: a linear head on points of unit length.
    weight = 2 * found.centroids / assigner.scale
    return Layers([(weight, weight.new_zeros(problem.k))], unit=True)


def restarts(options: Config, count: int) -> int:
    """`restarts`, or for `auto` more the fewer points there are: a single run of k-means often ends in a poor optimum
    where clusters are small, and costs little there."""
    return options.restarts if options.restarts != "auto" else min(_MOST_RESTARTS, max(1, _RESTARTED // count))
