"""On Spectral Clustering: Analysis and an Algorithm (Ng, Jordan, Weiss, 2001), on a graph of nearest neighbours.

The points are embedded by the leading eigenvectors of the normalised adjacency of the graph, of which each row is
brought to unit length, and k-means clusters them there. New points go to the cluster that a linear classifier of the
fitted ones says.

Differences: the affinity is the symmetrised graph of the nearest neighbours by cosine, not a Gaussian of all pairs; and
it is regularised by a small constant between all points (Amini, Chen, Bickel, Levina, 2013), so that a few points that
hold to each other alone do not become a cluster.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepclust import config as options
from deepclust import seeding
from deepclust.clustering import assigners, kmeans, plane
from deepclust.clustering.assigners import Assigner
from deepclust.clustering.base import Points, Problem
from deepclust.clustering.neighbours import Neighbours
from deepclust.config import Count, NotNegative, config

_RESTARTS, _ITERATIONS = 10, 100  # of k-means in the few dimensions of the eigenvectors
_TOLERANCE = 1e-5
_MOST_NUMBERS = 1 << 27  # in the vectors that ARPACK keeps, 1 GiB: 6 million points for 10 clusters, 67,000 for 1,000


@config
class Config(options.Config):
    """Options of spectral clustering."""

    neighbours: Count = 15
    """Nearest neighbours of each image in the graph."""
    regularisation: NotNegative = 0.1
    """Of the mean degree, what is spread evenly over edges between all images."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Fit clusters of the graph, and a classifier of them; of a sample where eigenvectors would take much memory."""
    points, most = problem.points, _MOST_NUMBERS // _space(problem.k)
    if len(points) > most:
        points = points.once(("spectral sample", most), lambda: _sample(problem.points, most))
    clusters = cluster(embedded(points, problem.k, options), problem.seed)
    return assigners.classifier(points.features, clusters.to(points.features.device), problem.k)


def cluster(embedded_NK: Tensor, seed: int) -> Tensor:
    """The cluster (N,) int64 of each embedded point, on the CPU."""
    found = kmeans.fit(embedded_NK, embedded_NK.shape[1], seed=seed, iterations=_ITERATIONS, restarts=_RESTARTS)
    return found.assignments


def embedded(points: Points, dim: int, options: Config) -> Tensor:
    """Points by the leading eigenvectors of their graph, rows (N, dim) float32 of unit length, on the CPU.

    Computed once, whatever the seeds of fits: they differ in k-means alone.
    """

    def make() -> Tensor:
        vectors = embed(adjacency(points.graph(options.neighbours)), dim, options.regularisation)
        return F.normalize(torch.from_numpy(vectors).float(), dim=1)

    return points.once(("spectral", dim, options.neighbours, options.regularisation), make)


def _sample(points: Points, most: int) -> Points:
    chosen = plane.sample(len(points), most, "spectral", len(points))
    return Points(points.features[chosen.to(points.features.device)])


def _space(dim: int) -> int:
    """Vectors that ARPACK keeps in memory, to find so many."""
    return max(2 * dim + 1, 20 + dim)


def adjacency(graph: Neighbours) -> scipy.sparse.csr_array:
    """The symmetric adjacency (N, N): 1 between mutual neighbours, ½ where only one is the other's."""
    count, width = graph.indices.shape
    columns = graph.indices.cpu().numpy().ravel()
    rows = np.repeat(np.arange(count), width)
    directed = scipy.sparse.csr_array((np.full(len(rows), 0.5), (rows, columns)), shape=(count, count))
    return (directed + directed.T).tocsr()


def embed(adjacency: scipy.sparse.csr_array, dim: int, regularisation: float) -> NDArray[np.float64]:
    """The `dim` leading eigenvectors (N, dim) of D^-½ (A + τ/N · 11ᵀ) D^-½, where τ is `regularisation` times the mean
    degree, and D holds the degrees with it."""
    count = adjacency.shape[0]
    degrees = adjacency.sum(axis=1)
    tau = regularisation * degrees.mean()
    root = 1 / np.sqrt(degrees + tau)

    def apply(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = root * vector.ravel()
        product: NDArray[np.float64] = root * (adjacency @ scaled + tau / count * scaled.sum())
        return product

    if dim >= count - 1:  # more than ARPACK finds
        matrix = root[:, None] * (adjacency.toarray() + tau / count) * root
        return np.ascontiguousarray(np.linalg.eigh(matrix)[1][:, ::-1][:, :dim])
    operator = scipy.sparse.linalg.LinearOperator((count, count), matvec=apply, dtype=np.float64)
    start = torch.rand(count, generator=seeding.generator("spectral"), dtype=torch.float64).numpy()
    wide = min(count, _space(dim))
    restarts = np.random.default_rng(seeding.derive("ARPACK"))  # of a space that is exhausted
    values, vectors = scipy.sparse.linalg.eigsh(
        operator, dim, which="LA", v0=start, ncv=wide, tol=_TOLERANCE, rng=restarts
    )
    leading: NDArray[np.float64] = vectors[:, np.argsort(-values, kind="stable")]
    return leading
