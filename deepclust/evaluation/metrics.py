"""Agreement of clusters with classes, and qualities that need no labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import pairwise_distances

Labels = NDArray[np.int64]
_CHUNK = 1 << 22  # numbers in float64 at once, 32 MiB


def matched_accuracy(labels: Labels, clusters: Labels) -> float:
    """Share of items in the cluster of their class, under the best one-to-one matching (Hungarian; "ACC").

    With more clusters than classes, the items of unmatched clusters count as wrong.

    Args:
        labels: (N,) class of each item.
        clusters: (N,) cluster of each item.
    """
    counts = sklearn_metrics.cluster.contingency_matrix(clusters, labels)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))


def nmi(labels: Labels, clusters: Labels) -> float:
    """Normalised mutual information, arithmetic mean of the entropies."""
    return float(sklearn_metrics.normalized_mutual_info_score(labels, clusters))


def ari(labels: Labels, clusters: Labels) -> float:
    """Adjusted Rand index."""
    return float(sklearn_metrics.adjusted_rand_score(labels, clusters))


def distances(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean distances (N, N) for `silhouette`; once for many clusterings of the same few items."""
    matrix: NDArray[np.float32] = pairwise_distances(features)
    np.fill_diagonal(matrix, 0)
    return matrix


def silhouette(distance_matrix: NDArray[np.float32], clusters: Labels) -> float | None:
    """Mean silhouette in [-1, 1] (Rousseeuw, 1987); None where it is undefined: one cluster, or only singles."""
    if not 2 <= len(np.unique(clusters)) <= len(clusters) - 1:
        return None
    return float(sklearn_metrics.silhouette_score(distance_matrix, clusters, metric="precomputed"))


def rankme(features: NDArray[np.float32]) -> float:
    """Effective rank of the features (RankMe, arXiv 2210.02885, equation 1): exp of the singular values' entropy.

    Between 1 (all features on one line) and the smaller side of the matrix. Higher is better among models of one kind.

    Args:
        features: (N, D); may be a memory map, of which a part is read at a time where there are more rows than columns.
    """
    count, dim = features.shape
    if count >= dim:
        gram = np.zeros((dim, dim))
        step = max(1, _CHUNK // dim)
        for start in range(0, count, step):
            rows = features[start : start + step].astype(np.float64)
            gram += rows.T @ rows
    else:
        rows = features.astype(np.float64)
        gram = rows @ rows.T
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    if singular.sum() == 0:
        return 1.0
    p = singular / singular.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))
