"""How sure a clustering is of each point, what it is not sure enough of, and what leaving that out brings.

The score that decides on rejection is the mean of two: the probability of a point's cluster, averaged over the
clustering and its refits, which holds the margin to the second cluster and the agreement over refits; and the share of
its nearest training points in the same cluster. Beyond the distance of nearly all training points it falls by
1 / distance, so that what is like nothing that was seen is rejected though a head may be sure of it. For new points all
of it is computed from what is saved, of the training points a random 2,000.

N points, Q queries, M neighbours, D dimensions, K clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deepclust import seeding
from deepclust.clustering.assigners import Assigner, Centroids
from deepclust.clustering.base import means
from deepclust.clustering.clusters import Bank, Clusters, Judged, Refit, within_reach
from deepclust.evaluation.metrics import Labels

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
_WITHIN = 0.99  # of the training points
_BANK = 2000  # training points that are kept


def fit(
    assigner: Assigner,
    points_ND: Tensor,
    *,
    refits: Sequence[Assigner] = (),
    normalise: bool,
    algorithm: str,
    reject: float = 0,
) -> tuple[Clusters, Judged]:
    """Fitted clusters with what says how sure they are, and what they say of the training points.

    Args:
        assigner: The clusters.
        points_ND: float32 training points, at least one, of unit length already where `normalise` says so.
        refits: Fits of the same algorithm with other seeds; those of another number of clusters are left out.
        normalise: Whether features are brought to unit length first.
        algorithm: Its name.
        reject: Share of the training points that are to have no cluster.
    """
    alike = [refit for refit in refits if (refit.kind, refit.k) == (assigner.kind, assigner.k)]
    clusters = assigner.assign(points_ND)
    if isinstance(assigner, Centroids):
        centroids = assigner.centroids
    else:  # a cluster without points has the mean of all, from which it is no nearer than others
        centroids = means(points_ND, clusters, assigner.k)
        centroids = torch.where(centroids.isnan(), points_ND.mean(0, dtype=torch.float64).float(), centroids)
    order = torch.randperm(len(points_ND), generator=seeding.generator("bank", len(points_ND)))
    chosen = order[:_BANK].to(points_ND.device)
    fitted = Clusters(
        assigner=assigner,
        centroids=centroids,
        bank=Bank(F.normalize(points_ND[chosen], dim=1), clusters[chosen]),
        reach=torch.finfo(torch.float32).max,
        normalise=normalise,
        algorithm=algorithm,
        refits=[Refit(refit, matching(clusters, refit.assign(points_ND), assigner.k)) for refit in alike],
    )
    judged = fitted.judge(points_ND)
    distances = judged.distances.sort().values
    reach = float(distances[int(_WITHIN * (len(distances) - 1))])
    judged = judged._replace(scores=within_reach(judged.scores, judged.distances, reach))
    return dataclasses.replace(fitted, reach=reach, reject=threshold(judged.scores, reject)), judged


def matching(clusters_N: Tensor, others_N: Tensor, k: int) -> Tensor:
    """The other clustering's cluster (K,) int64 for each of ours, one to one, that share most points (Hungarian)."""
    shared = torch.bincount(clusters_N * k + others_N, minlength=k * k).view(k, k)
    found = torch.from_numpy(linear_sum_assignment(shared.cpu().numpy(), maximize=True)[1])
    return found.to(clusters_N.device)


def threshold(scores_N: Tensor, share: float) -> float | None:
    """The score below which this share of the points lies, at most; fewer where scores are equal, never all of them.

    Args:
        scores_N: Of training points.
        share: From 0 to less than 1; 0 gives None, by which nothing is rejected.
    """
    if not share:
        return None
    return float(scores_N.sort().values[min(int(share * len(scores_N) + 1e-9), len(scores_N) - 1)])


def neighbours_agreement(clusters_Q: Tensor, neighbours_QM: Tensor, clusters_N: Tensor) -> Tensor:
    """Share (Q,) float32 of each point's nearest training points that are in its cluster.

    Args:
        clusters_Q: Clusters of the points.
        neighbours_QM: Indices of their nearest training points.
        clusters_N: Clusters of the training points.
    """
    return (clusters_N[neighbours_QM] == clusters_Q[:, None]).float().mean(1)


class Covered(NamedTuple):
    """What the surest points are worth.

    Attributes:
        coverage: Their share of all points.
        accuracy: Share of them that is in the cluster of its class.
        perfect: The same if only wrong points were left out, as long as there are any: min(1, a / coverage), where a is
            the accuracy on all points.
        gained: (accuracy - a) / (perfect - a), what of the possible gain there is; None where none is possible.
    """

    coverage: float
    accuracy: float
    perfect: float
    gained: float | None


def right(labels_N: Labels, clusters_N: Labels) -> NDArray[np.bool_]:
    """Whether each point is in the cluster of its class, under the best one-to-one matching on all of them."""
    shared = np.zeros((labels_N.max() + 1, clusters_N.max() + 1), dtype=np.int64)
    np.add.at(shared, (labels_N, clusters_N), 1)
    classes, clusters = linear_sum_assignment(shared, maximize=True)
    of_class = np.full(len(shared), -1)
    of_class[classes] = clusters
    found: NDArray[np.bool_] = of_class[labels_N] == clusters_N
    return found


def covered(right_N: NDArray[np.bool_], kept_N: NDArray[np.bool_]) -> Covered:
    """What the points that are kept are worth, of which there is at least one."""
    coverage, before, accuracy = float(kept_N.mean()), float(right_N.mean()), float(right_N[kept_N].mean())
    perfect = min(1.0, before / coverage)
    gained = (accuracy - before) / (perfect - before) if perfect > before else None
    return Covered(coverage, accuracy, perfect, gained)


def table(labels_N: Labels, clusters_N: Labels, scores_N: NDArray[np.float32]) -> list[Covered]:
    """Accuracy against coverage, at `COVERAGES`: the points of the highest scores, of equal ones the first.

    Args:
        labels_N: Classes, from 0.
        clusters_N: Clusters before any rejection.
        scores_N: How sure each is.
    """
    found, order = right(labels_N, clusters_N), np.argsort(-scores_N, kind="stable")
    rows = []
    for coverage in COVERAGES:
        kept = np.zeros(len(order), dtype=bool)
        kept[order[: max(1, round(coverage * len(order)))]] = True
        rows.append(covered(found, kept))
    return rows
