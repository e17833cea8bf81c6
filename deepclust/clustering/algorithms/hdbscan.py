"""Hierarchical Density Estimates (Campello, Moulavi, Zimek, Sander, TKDD 2015; HDBSCAN*), by scikit-learn.

It finds its own number of clusters, which need not be the problem's k, and calls what lies between them noise. New
points, noise among them, go to the cluster that a linear classifier of the fitted ones says. Where all is noise there
is one cluster.

Differences: it works in a plane of neighbours (deepclust/clustering/plane.py), since in many dimensions most points are
noise, on a random 3,000 of more points; the smallest cluster follows the number of points and k; and clusters are the
leaves of the hierarchy, since the most persistent ones join classes that touch (measured on Fashion-MNIST).
"""

from __future__ import annotations

import torch

from deepclust import config as options
from deepclust.clustering import assigners, base, plane
from deepclust.clustering.assigners import Assigner, Centroids
from deepclust.clustering.base import Problem
from deepclust.config import Auto, Count, Positive, Several, config

_MOST = 3000  # points in the plane, which then takes some 15 s on one core
_SHARE = 2  # parts of a cluster of mean size that `auto` still calls a cluster


@config
class Config(options.Config):
    """Options of HDBSCAN."""

    least: Several | Auto = "auto"
    """Images in the smallest cluster, of those sampled; auto: half of what k even clusters have, at least 5."""
    neighbours: Count = 15
    """Neighbours, itself among them, at whose distance an image's density is measured (min_samples)."""
    perplexity: Positive = 30.0
    """Neighbours that count in the plane."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Fit clusters of a sample, and a classifier of them; their number is the assigner's `k`."""
    from sklearn.cluster import HDBSCAN

    chosen = plane.sample(len(problem.points), _MOST, "hdbscan", problem.seed).to(problem.features.device)
    points = problem.features[chosen]
    least = max(5, len(points) // (_SHARE * problem.k)) if options.least == "auto" else options.least
    clusters = torch.full((len(points),), -1)
    if len(points) >= least:
        found = HDBSCAN(
            min_cluster_size=least,
            min_samples=min(options.neighbours, len(points)),
            cluster_selection_method="leaf",
            algorithm="kd_tree",
            copy=True,
        ).fit_predict(plane.flatten(points, perplexity=options.perplexity))
        clusters = torch.from_numpy(found).long()
    k = int(clusters.max()) + 1
    if k < 2:
        everything = clusters.new_zeros(len(points)).to(points.device)
        return Centroids.of(base.means(points, everything, 1), points)
    return assigners.classifier(points, clusters.to(points.device), k)
