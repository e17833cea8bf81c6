"""Gaussian mixture by expectation-maximisation (Dempster, Laird, Rubin, 1977), of diagonal covariances; scikit-learn.

It starts from k-means, and is fitted to standardised features; the scaling is folded into means and variances.

Differences: fitted to a random 20,000 of more points.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from deepclust import config as options
from deepclust.clustering import kmeans, plane
from deepclust.clustering.assigners import Assigner, Gaussians
from deepclust.clustering.base import Problem
from deepclust.config import Count, Positive, config

_MOST = 20_000  # points; in float64 and a few copies
_START_ITERATIONS = 20  # of k-means
_SAME = 1e-6  # of the largest standard deviation, below which a feature counts as constant


@config
class Config(options.Config):
    """Options of the Gaussian mixture."""

    iterations: Count = 100
    """Most iterations of expectation-maximisation."""
    floor: Positive = 0.1
    """Added to each variance of a cluster, as a share of the feature's variance over all images."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Fit a mixture."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    chosen = plane.sample(len(problem.points), max(_MOST, problem.k), "gmm", problem.seed)
    raw = problem.features[chosen.to(problem.features.device)].cpu().double()
    mean, std = raw.mean(0), raw.std(0, correction=0)
    std = torch.where(std > _SAME * std.max(), std, std.max() or 1.0)
    points = (raw - mean) / std
    start = kmeans.fit(points.float(), problem.k, seed=problem.seed, iterations=_START_ITERATIONS)
    sizes = torch.bincount(start.assignments, minlength=problem.k).double().clamp(min=1)
    within = torch.zeros(problem.k, raw.shape[1], dtype=torch.float64)
    within.index_add_(0, start.assignments, (points - start.centroids.double()[start.assignments]).square())
    mixture = GaussianMixture(
        problem.k,
        covariance_type="diag",
        reg_covar=options.floor,
        max_iter=options.iterations,
        means_init=start.centroids.double().numpy(),
        weights_init=(sizes / sizes.sum()).numpy(),
        precisions_init=(1 / (within / sizes[:, None] + options.floor)).numpy(),
        random_state=0,  # unused: all is initialised
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iteration's mixture is a mixture
        mixture.fit(points.numpy())
    means, variances = torch.from_numpy(mixture.means_) * std + mean, torch.from_numpy(mixture.covariances_) * std**2
    log_weights = torch.from_numpy(np.log(mixture.weights_))
    device = problem.features.device
    return Gaussians(*(found.float().to(device) for found in (means, variances, log_weights)))
