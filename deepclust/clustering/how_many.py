"""How many clusters there are, estimated without labels, with the evidence.

Silhouettes are compared in a plane that keeps neighbours, since in the features themselves they say little (Vision
Transformers for unlabelled data, arXiv 2406.02465), and are multiplied by the stability of the clusters: how well
clusterings of different subsamples agree on common points (Ben-Hur, Elisseeff, Guyon, 2002).

Each of a few subsamples has a plane and a seed of its own. In each, k-means makes k clusters for a range of k, first in
geometric steps, then everywhere near the best. The estimate is the k of the largest score, mean silhouette times the
root of mean agreement (by itself, agreement is best for very few clusters); each subsample alone says how sure that is.

N points, D dimensions, R subsamples, S points that some subsample has.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepclust import config as options
from deepclust import seeding
from deepclust.clustering import plane
from deepclust.config import AtLeastTen, Auto, Positive, Several, config
from deepclust.evaluation import metrics

SAME = 0.15  # two numbers of clusters that differ by no more say the same
_LEAST = 10  # points of which an estimate is tried
_SHARE = 0.8  # of the points, in a subsample
_STEP = 1.1  # between numbers of clusters that are tried first
_REFINED = 20  # numbers of clusters tried near the best
_RESTARTS = 4  # of k-means in a plane
_RUNNERS_UP = 3


@config
class Config(options.Config):
    """Options of the estimate."""

    least: Several = 2
    """Fewest clusters that are considered."""
    most: Several | Auto = "auto"
    """Most clusters that are considered; auto: a tenth of a subsample, for few images 100 or a third of it."""
    subsamples: Several = 5
    """Subsamples of 80 % each, whose clusters are compared."""
    images: AtLeastTen = 2500
    """Images of which the subsamples are drawn, where there are more."""
    perplexity: Positive = 60.0
    """Neighbours that count in the plane."""

    def _check(self) -> None:
        if self.most != "auto" and self.least > self.most:
            raise ValueError(
                f"least: expected at most {self.most}, as most is, got {self.least}; lower it or raise most"
            )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What speaks for a number of clusters.

    Attributes:
        k: Number of clusters.
        silhouette: Mean silhouette in the plane, mean over the subsamples; -1 to 1.
        stability: Adjusted Rand index between the clusters of two subsamples on common points, mean over the pairs.
        score: silhouette · √stability, each at least 0.
    """

    k: int
    silhouette: float
    stability: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How many clusters there are, and why.

    Attributes:
        k: The estimate.
        table: All numbers that were tried, by rising k; empty if `reason` is not.
        runners_up: The best others, each more than 15 % from k and from better ones; the best first.
        alone: What each subsample says alone.
        sure: Share of the subsamples that say k or within 15 % of it.
        interval: The least and the largest that a subsample says, k included.
        edge: Whether k is the least or the most that was considered, so that it may lie beyond.
        reason: Why nothing was estimated and k is 1; empty otherwise.
    """

    k: int
    table: tuple[Candidate, ...] = ()
    runners_up: tuple[Candidate, ...] = ()
    alone: tuple[int, ...] = ()
    sure: float = 0.0
    interval: tuple[int, int] = (1, 1)
    edge: Literal["", "least", "most"] = ""
    reason: str = ""


def estimate(features_ND: Tensor, options: Config, *, seed: int) -> Estimate:
    """Estimate the number of clusters.

    Where there are fewer than 10 points, or all of some subsample have one direction, the answer is 1, with the reason.
    A range that is wider than the data ends at the number of distinct points, and one cluster below the points of a
    subsample.

    Args:
        features_ND: float32, finite, at least one.
        options: The range, and how much is computed.
        seed: Decides which points are drawn, and the starts of k-means.
    """
    chosen = plane.sample(len(features_ND), options.images, "how many", seed)
    points = features_ND[chosen.to(features_ND.device)].cpu()
    if len(points) < _LEAST:
        return Estimate(k=1, reason=f"there are fewer than {_LEAST} images")
    subsamples = [_Subsample(points, options.perplexity, seed, number) for number in range(options.subsamples)]
    if any(subsample.collapsed for subsample in subsamples):
        return Estimate(k=1, reason="the features of nearly all images have one direction")
    most = min(_most(options, len(subsamples[0].members)), len(torch.unique(points, dim=0)))
    least = min(options.least, most)
    trials = {k: _Trial(subsamples, k, len(points)) for k in _steps(least, most)}
    best = max(trials, key=lambda k: trials[k].score)
    for k in _near(best, least, most):
        if k not in trials:
            trials[k] = _Trial(subsamples, k, len(points))
    return _conclude(trials, least, most)


class _Subsample:
    """A part of the points in a plane of its own."""

    def __init__(self, points: Tensor, perplexity: float, seed: int, number: int) -> None:
        count = max(_LEAST - 1, round(_SHARE * len(points)))
        self.members = plane.sample(len(points), count, "subsample", seed, number).numpy()
        self.plane = plane.flatten(points[self.members], perplexity=perplexity)
        self.collapsed = not self.plane.any()
        self.distances = metrics.distances(self.plane)
        self.seed = seeding.derive("how many", seed, number) % 2**32

    def cluster(self, k: int) -> NDArray[np.int64]:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
            found: NDArray[np.int64] = (
                KMeans(k, n_init=_RESTARTS, random_state=self.seed).fit_predict(self.plane).astype(np.int64)
            )
        return found


class _Trial:
    """k clusters in each subsample.

    Attributes:
        silhouettes: (R,).
        agreements: (R, R), symmetric; NaN on the diagonal.
    """

    def __init__(self, subsamples: list[_Subsample], k: int, count: int) -> None:
        self.k = k
        self.silhouettes = np.zeros(len(subsamples))
        clusters = np.full((len(subsamples), count), -1)
        for number, subsample in enumerate(subsamples):
            found = subsample.cluster(k)
            clusters[number, subsample.members] = found
            self.silhouettes[number] = silhouette(subsample.distances, found)
        self.agreements = np.full((len(subsamples), len(subsamples)), np.nan)
        for one, other in combinations(range(len(subsamples)), 2):
            common = (clusters[one] >= 0) & (clusters[other] >= 0)
            agreement = metrics.ari(clusters[one, common], clusters[other, common])
            self.agreements[one, other] = self.agreements[other, one] = agreement

    @property
    def score(self) -> float:
        return _score(self.silhouettes.mean(), np.nanmean(self.agreements))

    def alone(self, number: int) -> float:
        """The score of one subsample, of whose clusters the others' agree or not."""
        return _score(self.silhouettes[number], np.nanmean(self.agreements[number]))

    def candidate(self) -> Candidate:
        return Candidate(
            k=self.k,
            silhouette=float(self.silhouettes.mean()),
            stability=float(np.nanmean(self.agreements)),
            score=self.score,
        )


def silhouette(distances_NN: NDArray[np.float32], clusters_N: NDArray[np.int64]) -> float:
    """Mean silhouette (Rousseeuw, 1987), 0 of a point alone in its cluster; 0 where there is but one cluster.

    As `metrics.silhouette`, by one matrix product, which is many times faster for many clusterings of the same points.

    Args:
        distances_NN: Between all points.
        clusters_N: The cluster of each.
    """
    names, clusters = np.unique(clusters_N, return_inverse=True)
    if len(names) < 2:
        return 0.0
    sizes = np.bincount(clusters)
    places = np.arange(len(clusters))
    one_hot = (clusters[:, None] == np.arange(len(names))).astype(distances_NN.dtype)
    with threadpoolctl.threadpool_limits(1):
        sums = (distances_NN @ one_hot).astype(np.float64)
    within = sums[places, clusters] / np.maximum(sizes[clusters] - 1, 1)
    means = sums / sizes
    means[places, clusters] = np.inf
    between = means.min(1)
    largest = np.maximum(within, between)
    values = np.divide(between - within, largest, out=np.zeros_like(largest), where=largest > 0)
    return float(np.where(sizes[clusters] > 1, values, 0.0).mean())


def _score(quality: float, stability: float) -> float:
    return float(max(0.0, float(quality)) * max(0.0, float(stability)) ** 0.5)


def _most(options: Config, count: int) -> int:
    if options.most != "auto":
        return min(options.most, count - 1)
    return max(2, min(count // 3, max(100, count // 10)))


def _steps(least: int, most: int) -> list[int]:
    found, exact = [least], float(least)
    while found[-1] < most:
        exact = max(exact * _STEP, found[-1] + 1)
        found.append(min(most, round(exact)))
    return found


def _near(best: int, least: int, most: int) -> Iterable[int]:
    low, high = max(least, int(best * (1 - SAME))), min(most, int(np.ceil(best * (1 + SAME))))
    return sorted({round(k) for k in np.linspace(low, high, min(_REFINED, high - low + 1))})


def _conclude(trials: dict[int, _Trial], least: int, most: int) -> Estimate:
    tried = sorted(trials)
    table = tuple(trials[k].candidate() for k in tried)
    best = max(table, key=lambda candidate: candidate.score)  # of equal ones the first
    alone = tuple(
        max(tried, key=lambda k: trials[k].alone(number)) for number in range(len(trials[best.k].silhouettes))
    )
    return Estimate(
        k=best.k,
        table=table,
        runners_up=_peaks(table, best.k),
        alone=alone,
        sure=sum(_same(k, best.k) for k in alone) / len(alone),
        interval=(min(*alone, best.k), max(*alone, best.k)),
        edge="least" if best.k == least else "most" if best.k == most else "",
    )


def _peaks(table: tuple[Candidate, ...], best: int) -> tuple[Candidate, ...]:
    """The best candidates no two of which say the same, nor what the best says."""
    found: list[Candidate] = []
    for candidate in sorted(table, key=lambda candidate: -candidate.score):
        if not any(_same(candidate.k, k) for k in (best, *(other.k for other in found))):
            found.append(candidate)
    return tuple(found[:_RUNNERS_UP])


def _same(k: int, other: int) -> bool:
    return abs(k - other) <= SAME * other
