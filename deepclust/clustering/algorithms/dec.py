"""Unsupervised Deep Embedding for Clustering Analysis (DEC), arXiv 1511.06335.

Centroids and the embedding in which they lie learn together, from a target that sharpens the soft assignments to them.

Differences: the embedding is a linear map of frozen features, begun as their leading principal axes, in place of an
autoencoder's encoder, and scaled so that the Student's t distribution, whose scale is 1, fits the distances to the
centroids; Adam, not SGD.

B batch, N points, R dimensions of the embedding, K clusters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import config as options
from deepclust import seeding
from deepclust.clustering import heads, kmeans
from deepclust.clustering.assigners import Assigner, StudentT
from deepclust.clustering.base import Problem
from deepclust.clustering.heads import Inputs
from deepclust.config import Count, Positive, Share, config

_RESTARTS, _ITERATIONS = 5, 50  # of the k-means that finds the first centroids
_ROWS = 1 << 13  # points whose target is computed at once


@config
class Config(options.Config):
    """Options of DEC."""

    dim: Count = 10
    """Dimensions of the embedding; at most those of the features, and 128."""
    steps: Count = 1000
    """Most steps of training."""
    interval: Count = 100
    """Steps between two computations of the target."""
    tolerance: Share = 0.001
    """Training ends when a smaller share of the images than this changed its cluster since the last target."""
    batch: Count = 512
    """Images of a step."""
    learning_rate: Positive = 0.001
    """Of Adam."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Train an embedding and centroids, again from another seed where a cluster is left without points."""
    inputs = Inputs.of(problem.features)
    best, fewest = None, math.inf
    for attempt in range(heads.ATTEMPTS):
        model = train(inputs.points, problem.k, options, seeding.derive("DEC", problem.seed, attempt))
        sizes = torch.bincount(model.assignments(inputs.points).argmax(1), minlength=problem.k)
        empty = int((sizes == 0).sum())
        if empty < fewest:
            best, fewest = model, empty
        if not empty:
            break
    assert best is not None
    return StudentT(*inputs.folded(best.weight.detach()), best.centroids.detach())


def soft_assignments(embedded_BR: Tensor, centroids_KR: Tensor) -> Tensor:
    """q_ij ∝ 1 / (1 + ‖z_i - μ_j‖²) (equation 1, α = 1), (B, K)."""
    squared = (embedded_BR[:, None] - centroids_KR).square().sum(2)
    return F.normalize(1 / (1 + squared), p=1, dim=1)


def target(assignments_NK: Tensor) -> Tensor:
    """p_ij ∝ q_ij² / Σ_i q_ij (equation 3), (N, K)."""
    return F.normalize(assignments_NK.square() / assignments_NK.sum(0), p=1, dim=1)


def divergence(target_BK: Tensor, assignments_BK: Tensor) -> Tensor:
    """KL(P ‖ Q) (equation 2), the mean of the points."""
    return (target_BK * (target_BK / assignments_BK).log()).sum(1).mean()


class DEC(nn.Module):
    """A linear embedding, and centroids in it.

    Args:
        weight_RP: Of the embedding.
        centroids_KR: In the embedding.
    """

    def __init__(self, weight_RP: Tensor, centroids_KR: Tensor) -> None:
        super().__init__()
        self.weight, self.centroids = nn.Parameter(weight_RP), nn.Parameter(centroids_KR)

    def forward(self, points_BP: Tensor) -> Tensor:
        """Soft assignments (B, K)."""
        return soft_assignments(F.linear(points_BP, self.weight), self.centroids)

    @torch.no_grad()
    def assignments(self, points_NP: Tensor) -> Tensor:
        """Soft assignments (N, K) of any number of points."""
        return torch.cat([self(part) for part in torch.split(points_NP, _ROWS)])


def start(points_NP: Tensor, k: int, dim: int, seed: int) -> DEC:
    """The leading dimensions of the inputs, and k-means in them, at a mean squared distance to the centroids of 1."""
    leading = points_NP[:, :dim]
    found = kmeans.fit(leading.contiguous(), k, seed=seed, iterations=_ITERATIONS, restarts=_RESTARTS)
    scale = (found.inertia / len(points_NP)) ** -0.5 if found.inertia > 0 else 1.0
    weight = scale * torch.eye(leading.shape[1], points_NP.shape[1], device=points_NP.device)
    return DEC(weight, scale * found.centroids)


def train(points_NP: Tensor, k: int, options: Config, seed: int) -> DEC:
    """Train from k-means until hardly any point changes its cluster."""
    model = start(points_NP, k, options.dim, seed)
    generator = seeding.generator("DEC", seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    sharpened, before = torch.empty(0), torch.empty(0)
    for step in range(options.steps):
        if step % options.interval == 0:
            assignments = model.assignments(points_NP)
            sharpened, clusters = target(assignments), assignments.argmax(1)
            if step and (clusters != before).float().mean() < options.tolerance:
                break
            before = clusters
        rows = torch.randint(len(points_NP), (options.batch,), generator=generator).to(points_NP.device)
        loss = divergence(sharpened[rows], model(points_NP[rows]))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model
