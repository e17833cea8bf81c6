"""What the learned heads on frozen features share: their inputs, their start, the training loop and the watchdog.

Several linear heads are trained at once on pairs of a point and one of its nearest neighbours, half of them from
clusters of k-means, half from spectral ones; the one of the lowest loss is taken. A head that leaves a cluster
without points counts as collapsed: heads that did not are preferred, and where all did, all start again from another
seed. Where that does not help either, as for fewer distinct points than clusters, the best is taken, and some of its
clusters stay empty.

N points, D dimensions, P dimensions of the inputs, M neighbours, H heads, B batch, K clusters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust import config as options
from deepclust import seeding
from deepclust.clustering import base, kmeans
from deepclust.clustering.algorithms import spectral
from deepclust.clustering.assigners import Layers
from deepclust.clustering.base import Points, Problem
from deepclust.config import Count, Positive, config

_DIM = 128  # most dimensions of the inputs
_ROWS = 1 << 13  # points that are looked at at once
ATTEMPTS = 3  # seeds that are tried where heads collapse
_MOST_NUMBERS = 1 << 26  # probabilities of a step, of all heads: fewer heads are trained from some 500 clusters on
_PER_CLUSTER = 16  # points of a batch, at least: its marginal is taken for that of all points
_JUDGED = 5  # the last 1/5 of the steps tells which head is best
_SAMPLE, _SAMPLE_PER_CLUSTER = 10_000, 100  # points from which a head's start is found, at least
_ITERATIONS = 20  # of the k-means that finds it
_SMALL = 1 << 19  # logits of a step up to which one thread is fastest: several wait for each other at each sum
_SPECTRAL = 100  # clusters up to which heads also start from spectral clustering, which takes as many eigenvectors


@config
class HeadConfig(options.Config):
    """Options of learned heads."""

    heads: Count = 16
    """Heads that are trained at once, each from a start of its own; the one of the lowest loss counts."""
    neighbours: Count = 15
    """Nearest neighbours of each image, of which it is paired with one at random."""
    steps: Count = 1000
    """Steps of training."""
    batch: Count = 512
    """Images of a step, at least 16 for each cluster."""
    learning_rate: Positive = 0.1
    """Of Adam; falls to 0 along a cosine."""


@dataclass(frozen=True)
class Inputs:
    """What heads see of points: unit length, centred, along the leading principal axes, mean squared length 1.

    Attributes:
        points: (N, P) float32.
        mean: (D,) float32, of the points of unit length.
        axes: (P, D) float32; the inputs are their products with centred points of unit length.
    """

    points: Tensor
    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Inputs:
        """The inputs of features (N, D) float32."""
        mean, covariance = _moments(features)
        variances, axes = torch.linalg.eigh(covariance)
        kept = min(_DIM, len(variances))
        scale = float(variances[-kept:].sum().clamp(min=0).sqrt())
        axes = (axes.T[-kept:].flip(0) / (scale if scale > 1e-6 else 1.0)).float()
        rows = torch.split(features, _ROWS)
        found = torch.cat([F.linear(F.normalize(part, dim=1) - mean.float(), axes) for part in rows])
        return cls(found, mean.float(), axes)

    def folded(self, weight_RP: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (R, D) and bias (R,) of the linear map of features of unit length that `weight_RP` is of inputs."""
        weight = weight_RP.double() @ self.axes.double()
        return weight.float(), -(weight @ self.mean.double()).float()

    def assigner(self, head: Heads) -> Layers:
        """A single head as an assigner of features."""
        weight, bias = self.folded(head.weight[0].detach())
        return Layers([(weight, bias + head.bias[0].detach())], unit=True)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the points at unit length, float64."""
    dim = features.shape[1]
    total = torch.zeros(dim, dtype=torch.float64, device=features.device)
    for part in torch.split(features, _ROWS):
        total += F.normalize(part, dim=1).sum(0, dtype=torch.float64)
    mean = total / len(features)
    squares = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for part in torch.split(features, _ROWS):
        centred = F.normalize(part, dim=1) - mean.float()
        squares += (centred.T @ centred).double()
    return mean, squares / len(features)


class Heads(nn.Module):
    """H linear heads on the same inputs.

    Args:
        weight_HKP: float32.
        bias_HK: float32.
    """

    def __init__(self, weight_HKP: Tensor, bias_HK: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight_HKP), nn.Parameter(bias_HK)

    def forward(self, points_BP: Tensor) -> Tensor:
        """Logits (B, H, K)."""
        # In memory the points are innermost: what `log_softmax` and `logsumexp` then do is many times faster.
        flat = torch.addmm(self.bias.flatten()[:, None], self.weight.flatten(0, 1), points_BP.T)
        return flat.view(*self.bias.shape, len(points_BP)).permute(2, 0, 1)

    def log_probabilities(self, points_BP: Tensor) -> Tensor:
        """Of the clusters, (B, H, K)."""
        return log_softmax(self(points_BP))

    def sizes(self, points_NP: Tensor) -> Tensor:
        """How many points each cluster (H, K) holds."""
        found = torch.zeros_like(self.bias, dtype=torch.int64)
        first = torch.arange(len(found), device=found.device) * found.shape[1]
        with torch.no_grad():
            for part in torch.split(points_NP, _ROWS):
                clusters = (self(part).argmax(2) + first).flatten()
                found += torch.bincount(clusters, minlength=found.numel()).view_as(found)
        return found

    def one(self, head: int) -> Heads:
        """A copy of one of them."""
        chosen = slice(head, head + 1)
        return Heads(self.weight[chosen].detach().clone(), self.bias[chosen].detach().clone())


def log_softmax(logits_BHK: Tensor) -> Tensor:
    """The logarithm of the softmax over the clusters, (B, H, K)."""
    return logits_BHK.permute(1, 2, 0).log_softmax(1).permute(2, 0, 1)


def logsumexp(values_BHK: Tensor) -> Tensor:
    """The logarithm of the sum over the clusters of exponentials, (B, H)."""
    return values_BHK.permute(1, 2, 0).logsumexp(1).T


def start(inputs: Inputs, problem: Problem, options: HeadConfig, attempt: int) -> Heads:
    """Heads that say how near the means of clusters are that k-means and spectral clustering find in turn.

    Each k-means has a sample and an initialisation of its own. Spectral clusters differ by the initialisation alone:
    those of all heads, attempts and fits share a sample and its eigenvectors.
    """
    k, seed, layers = problem.k, seeding.derive(problem.seed, attempt), []
    for head in range(min(options.heads, max(1, _MOST_NUMBERS // (_batch(options, k) * k)))):
        by_graph = head % 2 == 1 and k <= _SPECTRAL
        if by_graph:
            part = problem.points.once(("start", k), lambda: Points(_sampled(inputs, k, "start")))
            sample = part.features
            rows = spectral.embedded(part, k, spectral.Config(neighbours=options.neighbours))
        else:
            sample = rows = _sampled(inputs, k, "start", seed, head)
        found = kmeans.fit(rows, k, seed=seeding.derive("start", seed, head), iterations=_ITERATIONS)
        layers.append(_nearest_mean(sample, found.assignments.to(sample.device), k))
    weights, biases = zip(*layers, strict=True)
    return Heads(torch.stack(weights), torch.stack(biases))


def _sampled(inputs: Inputs, k: int, *seed: int | str) -> Tensor:
    order = torch.randperm(len(inputs.points), generator=seeding.generator(*seed))
    return inputs.points[order[: max(_SAMPLE, _SAMPLE_PER_CLUSTER * k)].to(inputs.points.device)]


def _batch(options: HeadConfig, k: int) -> int:
    """Points of a step."""
    return max(options.batch, _PER_CLUSTER * k)


def _nearest_mean(points: Tensor, clusters: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weight (K, P) and bias (K,) whose logits are the negative squared distances from the clusters' means, over the
    mean of those of the points, but for what is the same for all clusters."""
    means = base.means(points, clusters, k).nan_to_num()
    scale = 1 / (float((points - means[clusters]).square().sum(1).mean()) or 1.0)
    return 2 * scale * means, -scale * means.square().sum(1)


class Objective(ABC):
    """What heads are trained for.

    Args:
        heads: Those that are trained.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    @abstractmethod
    def loss(self, points_BP: Tensor, neighbours_BP: Tensor) -> Tensor:
        """The loss (H,) of each head, on points and a neighbour of each."""

    def after_step(self) -> None:
        """Called when the heads have been changed."""


def search(inputs: Inputs, problem: Problem, objective: Callable[[Heads], Objective], options: HeadConfig) -> Heads:
    """Train heads, all again from another seed where each of them collapsed.

    Returns: The one (H = 1) that leaves the fewest clusters empty, of those the one of the lowest loss.
    """
    nearest = problem.points.graph(options.neighbours).indices.to(inputs.points.device)
    best, rank = None, (math.inf, math.inf)
    for attempt in range(ATTEMPTS):
        heads = start(inputs, problem, options, attempt)
        losses = train(
            inputs.points, nearest, objective(heads), options, seeding.generator("pairs", problem.seed, attempt)
        )
        empty = (heads.sizes(inputs.points) == 0).sum(1)
        ranks = [*zip(empty.tolist(), losses.tolist(), strict=True)]
        if best is None or min(ranks) < rank:
            rank = min(ranks)
            best = heads.one(ranks.index(rank))
        if rank[0] == 0:
            break
    assert best is not None
    return best


def train(
    points: Tensor, nearest: Tensor, objective: Objective, options: HeadConfig, generator: torch.Generator
) -> Tensor:
    """Train the objective's heads in place.

    Args:
        points: Inputs (N, P).
        nearest: Indices (N, M) of each point's neighbours.
        objective: Has the heads.
        options: How long, and by which steps.
        generator: Draws the pairs.

    Returns:
        Each head's mean loss (H,) over the last steps.
    """
    count, k = len(points), objective.heads.bias.shape[1]
    batch = _batch(options, k)
    optimiser = torch.optim.Adam(objective.heads.parameters(), lr=options.learning_rate)
    judged = max(1, options.steps // _JUDGED)
    total = torch.zeros(len(objective.heads.bias), device=points.device)
    with _threads(batch * objective.heads.bias.numel()):
        for step in range(options.steps):
            optimiser.param_groups[0]["lr"] = options.learning_rate * (1 + math.cos(math.pi * step / options.steps)) / 2
            rows = torch.randint(count, (batch,), generator=generator).to(points.device)
            columns = torch.randint(nearest.shape[1], (batch,), generator=generator).to(points.device)
            loss = objective.loss(points[rows], points[nearest[rows, columns]])
            optimiser.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            objective.after_step()
            if step >= options.steps - judged:
                total += loss.detach()
    return total / judged


@contextmanager
def _threads(logits: int) -> Iterator[None]:
    """One thread for steps of few logits, put back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if logits <= _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
