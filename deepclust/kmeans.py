"""k-means by Lloyd's algorithm, and the concentration of its clusters.

One algorithm wherever it runs: seeded initialisation, means accumulated in float64, empty clusters moved to the worst
served points. Only the nearest-centroid search differs: faiss on the CPU where it is installed, torch elsewhere.

N points, K clusters, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust import seeding
from deepclust.errors import ConfigError, DataError

try:
    import faiss
except ImportError:  # GPU machines often have an image of their own without it
    faiss = None  # type: ignore[assignment]

_CHUNK_BYTES = 1 << 26  # of one block of the distance matrix, or of float64 rows


@dataclass(frozen=True)
class Clusters:
    """A fitted k-means.

    Attributes:
        centroids: (K, D) float32, on the points' device.
        assignments: (N,) int64, the nearest centroid of each point.
        distances: (N,) float32, Euclidean distance to it.
        inertia: Sum of the squared distances.
        iterations: Lloyd iterations made.
    """

    centroids: Tensor
    assignments: Tensor
    distances: Tensor
    inertia: float
    iterations: int


def fit(
    points_ND: Tensor,
    k: int,
    *,
    seed: int,
    iterations: int,
    initialisation: str = "k-means++",
    spherical: bool = False,
    tolerance: float = 1e-4,
) -> Clusters:
    """Cluster points.

    Args:
        points_ND: float32 points.
        k: Number of clusters.
        seed: Decides the initialisation.
        iterations: At most so many Lloyd iterations.
        initialisation: `k-means++` (Arthur and Vassilvitskii, 2007) or `points`, k distinct random points.
        spherical: Bring the centroids to unit length after every update.
        tolerance: Stop when the inertia falls by less than this share in one iteration.

    Raises:
        ConfigError: If k is not in 1..N.
        DataError: If a point is not finite.
    """
    count = len(points_ND)
    if not 1 <= k <= count:
        raise ConfigError(f"expected 1 ≤ k ≤ {count}, the number of points; got k = {k}; lower it")
    if not torch.isfinite(points_ND).all():
        raise DataError("expected finite points to cluster, got NaN or infinity; the encoder has diverged")
    points = points_ND.float().contiguous()
    centroids = _INITIALISATIONS[initialisation](points, k, seeding.generator(seed, "k-means", k))
    if spherical:
        centroids = F.normalize(centroids, dim=1)
    previous = math.inf
    for iteration in range(1, iterations + 1):  # noqa: B007 - reported below
        assignments, squared = assign(points, centroids)
        inertia = float(squared.sum(dtype=torch.float64))
        if inertia >= previous * (1 - tolerance):
            break
        previous = inertia
        centroids = _means(points, assignments, squared, k)
        if spherical:
            centroids = F.normalize(centroids, dim=1)
    assignments, squared = assign(points, centroids)
    return Clusters(centroids, assignments, squared.sqrt(), float(squared.sum(dtype=torch.float64)), iteration)


def assign(points_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point, and the squared Euclidean distance to it.

    Returns:
        Assignments (N,) int64 and squared distances (N,) float32, computed from the difference, so without the
        cancellation of the expanded square.
    """
    nearest = _nearest_faiss if faiss is not None and points_ND.device.type == "cpu" else _nearest_torch
    assignments = nearest(points_ND, centroids_KD)
    squared = torch.empty(len(points_ND), device=points_ND.device)
    chunk = max(1, _CHUNK_BYTES // (4 * points_ND.shape[1]))
    for start in range(0, len(points_ND), chunk):
        rows = slice(start, start + chunk)
        squared[rows] = (points_ND[rows] - centroids_KD[assignments[rows]]).square_().sum(1)
    return assignments, squared


def _nearest_faiss(points: Tensor, centroids: Tensor) -> Tensor:
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids.numpy())
    _, nearest = index.search(points.numpy(), 1)
    return torch.from_numpy(nearest[:, 0])


def _nearest_torch(points: Tensor, centroids: Tensor) -> Tensor:
    half_norms = centroids.square().sum(1) / 2
    chunk = max(1, _CHUNK_BYTES // (4 * len(centroids)))
    return torch.cat([(half_norms - block @ centroids.T).argmin(1) for block in torch.split(points, chunk)])


def _means(points: Tensor, assignments: Tensor, squared: Tensor, k: int) -> Tensor:
    """Means in float64; a cluster without points moves to the point farthest from its centroid, each to another one."""
    sums = torch.zeros(k, points.shape[1], dtype=torch.float64, device=points.device)
    chunk = max(1, _CHUNK_BYTES // (8 * points.shape[1]))
    for start in range(0, len(points), chunk):
        rows = slice(start, start + chunk)
        sums.index_add_(0, assignments[rows], points[rows].double())
    sizes = torch.bincount(assignments, minlength=k)
    centroids = (sums / sizes.clamp(min=1)[:, None]).float()
    empty = (sizes == 0).nonzero().flatten()
    if len(empty):
        farthest = torch.sort(squared, descending=True, stable=True).indices[: len(empty)]
        centroids[empty] = points[farthest]
    return centroids


def _random_points(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return points[torch.randperm(len(points), generator=generator)[:k].to(points.device)].clone()


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Each next centroid drawn with probability proportional to the squared distance to the nearest one so far."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    norms = points.square().sum(1)
    closest = torch.full((len(points),), math.inf, device=points.device)
    while len(chosen) < k:
        last = points[chosen[-1]]
        closest = torch.minimum(closest, (norms - 2 * (points @ last) + last @ last).clamp_(min=0))
        cumulative = closest.cumsum(0, dtype=torch.float64)
        # Fewer distinct points than clusters leave no weight: any point will do then.
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(points.device) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, draw, right=True)), len(points) - 1))
    return points[chosen].clone()


_INITIALISATIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "k-means++": _plus_plus,
    "points": _random_points,
}


def concentration(distances_N: Tensor, assignments_N: Tensor, *, k: int, temperature: float) -> Tensor:
    """Concentration φ of each cluster, the temperature of its prototype (PCL, arXiv 2005.04966, section 3.3).

    φ = mean ‖v − c‖₂ / log(n + 10) over the n members. Clusters of at most one member take the largest φ; then all are
    clipped to the 10th and 90th percentile and scaled so that their mean is the temperature.

    Args:
        distances_N: Distance of each point to its raw, not normalised, centroid.
        assignments_N: Cluster of each point.
        k: Number of clusters.
        temperature: Mean of the result.

    Returns:
        (K,) float32.
    """
    sizes = torch.bincount(assignments_N, minlength=k).double()
    sums = torch.zeros(k, dtype=torch.float64, device=distances_N.device)
    sums.index_add_(0, assignments_N, distances_N.double())
    phi = sums / sizes.clamp(min=1) / torch.log(sizes + 10)
    several = sizes > 1
    largest = phi[several].max() if several.any() else torch.ones((), dtype=torch.float64, device=phi.device)
    phi = torch.where(several, phi, largest)
    low, high = torch.quantile(phi, torch.tensor([0.1, 0.9], dtype=torch.float64, device=phi.device))
    phi = phi.clamp(low, high)
    mean = phi.mean()
    # All points on their centroids: every cluster is equally tight.
    phi = temperature * phi / mean if mean > 0 else torch.full_like(phi, temperature)
    return phi.float()
