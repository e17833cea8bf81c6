"""Hierarchical Grouping to Optimize an Objective Function (Ward, 1963), by scikit-learn: of all merges, always the one
that adds least to the squared distances within clusters.

New points go to the cluster that a linear classifier of the fitted ones says.

Differences: only clusters that are neighbours on the graph of nearest neighbours are merged (scikit-learn joins parts
of a graph that do not hang together), points are of unit length and in their leading principal components, and a random
10,000 stand for more.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F

from deepclust import config as options
from deepclust.clustering import assigners, neighbours, plane
from deepclust.clustering.algorithms.spectral import adjacency
from deepclust.clustering.assigners import Assigner
from deepclust.clustering.base import Problem
from deepclust.config import Count, config

_MOST = 10_000  # points
_DIMENSIONS = 100


@config
class Config(options.Config):
    """Options of Ward's method."""

    neighbours: Count = 15
    """Nearest neighbours of each image with which it may be merged first."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Fit clusters of a sample, and a classifier of them."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.decomposition import PCA

    count = len(problem.points)
    chosen = plane.sample(count, max(_MOST, problem.k), "ward", problem.seed).to(problem.features.device)
    points = problem.features[chosen]
    whole = len(points) == count
    graph = problem.points.graph(options.neighbours) if whole else neighbours.graph(points, options.neighbours)
    unit = F.normalize(points, dim=1).cpu().double().numpy()
    with np.errstate(invalid="ignore"):  # the share of the variance of equal points, which is not used
        reduced = PCA(min(_DIMENSIONS, *unit.shape), svd_solver="covariance_eigh").fit_transform(unit)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the number of connected components", UserWarning)  # it joins them
        found = AgglomerativeClustering(problem.k, connectivity=adjacency(graph), linkage="ward").fit_predict(reduced)
    return assigners.classifier(points, torch.from_numpy(found).to(points.device).long(), problem.k)
