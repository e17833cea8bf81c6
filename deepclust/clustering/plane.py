"""Visualizing Data using t-SNE (van der Maaten, Hinton, JMLR 2008): points in a plane that keeps their neighbours.

Differences: points are brought to unit length, then to their leading principal components, which are also where the
plane starts from, so that there is no randomness.
"""

from __future__ import annotations

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust import seeding

_DIMENSIONS, _ITERATIONS = 50, 500
_LEAST = 3  # points that t-SNE places
_COLLAPSED = 1e-9  # standard deviation of unit-length points, of which the start would be 0 / 0


def flatten(points_ND: Tensor, *, perplexity: float) -> NDArray[np.float32]:
    """The points in the plane (N, 2); all at 0 where they are fewer than three or do not differ in direction.

    It runs on one thread, since several OpenMP threads sum gradients in the order in which they finish.

    Args:
        points_ND: float32.
        perplexity: How many neighbours count; a third of the points at most.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = points_ND.cpu().double().numpy()
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    if len(points) < _LEAST or points.std(axis=0).max() < _COLLAPSED:
        return np.zeros((len(points), 2), dtype=np.float32)
    components = min(_DIMENSIONS, *points.shape)
    with threadpoolctl.threadpool_limits(1):
        points = PCA(components, svd_solver="covariance_eigh").fit_transform(points).astype(np.float32)
        start = np.zeros((len(points), 2), dtype=np.float32)
        start[:, :components] = points[:, :2] / points[:, 0].std() * 1e-4
        found: NDArray[np.float32] = TSNE(
            init=start, perplexity=min(perplexity, (len(points) - 1) / 3), max_iter=_ITERATIONS, random_state=0
        ).fit_transform(points)
    return found


def sample(count: int, most: int, *seed: int | str) -> Tensor:
    """Rising numbers (min(count, most),) int64 of points drawn from `count`, all of them if they are not more."""
    return torch.randperm(count, generator=seeding.generator(*seed))[:most].sort().values
